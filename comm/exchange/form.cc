#include "form.h"

#include <algorithm>

#include "plan_text.h"
#include "row_set.h"

namespace annulus {
namespace {

bool InRange(int64_t index, size_t size) { return 0 <= index && index < static_cast<int64_t>(size); }

class ProblemForm {
 public:
  explicit ProblemForm(const ExchangePlan& plan) : plan_(plan), problem_(plan.problem) {}

  absl::Status Check() const {
    ANNULUS_RETURN_IF_ERROR(CheckSizes());
    ANNULUS_RETURN_IF_ERROR(CheckChunks());
    ANNULUS_RETURN_IF_ERROR(CheckKeys());
    ANNULUS_RETURN_IF_ERROR(CheckGroups());
    return CheckSuperRows();
  }

 private:
  template <typename... Args>
  absl::Status Wrong(const Args&... what) const {
    return absl::FailedPreconditionError(absl::StrCat(plan_.name, ": ", absl::StrCat(what...)));
  }

  absl::Status CheckSizes() const {
    const size_t chunks = problem_.chunks.size();
    if (problem_.ranks < 1 || problem_.block_rows < 0 ||
        plan_.ranks.size() != static_cast<size_t>(problem_.ranks)) {
      return Wrong("problem: ", problem_.ranks, " ranks, ", problem_.block_rows, " rows a block, ",
                   plan_.ranks.size(), " rank plans");
    }
    if (problem_.keys.size() != chunks * chunks || problem_.pairs.size() != chunks * chunks) {
      return Wrong("problem: ", chunks, " chunks, ", problem_.keys.size(), " key ranges, ",
                   problem_.pairs.size(), " costs");
    }
    if (problem_.kv_heads < 1 || problem_.heads < 1 || problem_.heads % problem_.kv_heads != 0) {
      return Wrong("problem: ", problem_.heads, " query heads over ", problem_.kv_heads,
                   " kv heads: expected a multiple");
    }
    return absl::OkStatus();
  }

  absl::Status CheckChunks() const {
    const size_t chunks = problem_.chunks.size();
    size_t next = 0;
    for (int owner = 0; owner < problem_.ranks; ++owner) {
      int64_t row = 0;
      for (; next < chunks && problem_.chunks[next].owner == owner; ++next) {
        const RowRange& rows = problem_.chunks[next].rows;
        if (rows.begin != row || rows.end < rows.begin) break;
        row = rows.end;
      }
      if (row != problem_.block_rows)
        return Wrong("problem: chunks do not cover the block of rank ", owner, " in order");
    }
    return next == chunks ? absl::OkStatus() : Wrong("problem: chunk ", next, " is out of order");
  }

  absl::Status CheckKeys() const {
    for (size_t i = 0; i < problem_.chunks.size(); ++i) {
      for (size_t j = 0; j < problem_.chunks.size(); ++j) {
        const RowRange& keys = problem_.keys_of(i, j);
        const RowRange& rows = problem_.chunks[j].rows;
        const int64_t pairs = problem_.pairs_of(i, j);
        if (!keys.empty() && !Contains(rows, keys)) {
          return Wrong("problem: chunk ", i, " sees rows ", RowsText(keys), " of chunk ", j,
                       ", which has rows ", RowsText(rows));
        }
        // No upper bound: a row may carry several sequences.
        if (keys.empty() ? pairs != 0 : pairs < 1) {
          return Wrong("problem: chunk ", i, " against rows ", RowsText(keys), " of chunk ", j, " has ",
                       pairs, " pairs: expected ", keys.empty() ? "none" : "at least 1");
        }
      }
    }
    return absl::OkStatus();
  }

  absl::Status CheckGroups() const {
    std::vector<int> uses(static_cast<size_t>(problem_.heads));
    for (size_t g = 0; g < plan_.groups.size(); ++g) {
      const HeadGroup& group = plan_.groups[g];
      const int64_t heads = group.q_heads(), kv_heads = static_cast<int64_t>(group.kv_heads.size());
      if (group.q_begin < 0 || heads < 0 || group.q_end > problem_.heads) {
        return Wrong("head group ", g, " has query heads [", group.q_begin, ", ", group.q_end, ") of ",
                     problem_.heads);
      }
      const bool even = heads == 0 ? kv_heads == 0 : kv_heads > 0 && heads % kv_heads == 0;
      if (!even) {
        return Wrong("head group ", g, " has ", heads, " query heads over ", kv_heads,
                     " kv heads: expected a multiple");
      }
      for (int64_t i = 0; i < heads; ++i) {
        const int64_t head = group.q_begin + i, expected = head / (problem_.heads / problem_.kv_heads);
        const int64_t named = group.kv_heads[static_cast<size_t>(i * kv_heads / heads)];
        if (named != expected) {
          return Wrong("head group ", g, ": query head ", head, " would read kv head ", named, ": expected ",
                       expected);
        }
        ++uses[static_cast<size_t>(head)];
      }
    }
    const auto head = std::find_if(uses.begin(), uses.end(), [](int count) { return count != 1; });
    if (head == uses.end()) return absl::OkStatus();
    return Wrong("query head ", head - uses.begin(), " is in ", *head, " head groups: expected 1");
  }

  absl::Status CheckSuperRows() const {
    if (plan_.super_rows.empty() && plan_.super_size == 0) return absl::OkStatus();
    if (plan_.super_rows.size() != problem_.chunks.size()) {
      return Wrong("super_rows are those of ", plan_.super_rows.size(), " chunks: expected ",
                   problem_.chunks.size());
    }
    for (size_t c = 0; c < problem_.chunks.size(); ++c) {
      const int64_t begin = plan_.super_rows[c];
      if (begin >= 0 && begin <= plan_.super_size - problem_.chunks[c].rows.size()) continue;
      return Wrong("super_rows: chunk ", c, " lies at row ", begin, " of ", plan_.super_size);
    }
    return absl::OkStatus();
  }

  const ExchangePlan& plan_;
  const ExchangeProblem& problem_;
};

// Slots and steps of one rank.
class RankForm {
 public:
  RankForm(const ExchangePlan& plan, int cp_rank)
      : plan_(plan), problem_(plan.problem), me_(cp_rank), rank_(plan.ranks[static_cast<size_t>(cp_rank)]) {}

  absl::Status Check() {
    ANNULUS_RETURN_IF_ERROR(CheckSlots());
    for (step_ = 0; step_ < rank_.steps.size(); ++step_) ANNULUS_RETURN_IF_ERROR(CheckStep());
    return absl::OkStatus();
  }

 private:
  template <typename... Args>
  absl::Status Wrong(const Args&... what) const {
    return absl::FailedPreconditionError(
        absl::StrCat(plan_.name, ": ", StepText(plan_, me_, step_), ": ", absl::StrCat(what...)));
  }
  const Step& step() const { return rank_.steps[step_]; }
  const SlotSpec& spec(int slot) const { return rank_.slots[static_cast<size_t>(slot)]; }

  bool HasResult(Payload payload) const {
    return (payload == Payload::kOutput) == (plan_.pass == Pass::kForward);
  }
  // Empty if the slot's fields go together.
  std::string WhatIsWrongWith(const SlotSpec& slot) const;
  absl::Status CheckSlots() const;
  absl::Status CheckStep() const;
  absl::Status CheckRows(int slot, const BlockRows& rows) const;
  absl::Status CheckSlot(int slot) const;
  absl::Status CheckWritten(int slot) const;
  absl::Status CheckCopy() const;
  bool OwnsKvHeads(int group) const;
  absl::Status CheckTransfer() const;

  absl::Status CheckAttend() const;
  absl::Status CheckOperand(int slot, Payload payload) const;
  absl::Status CheckResult(int slot, Payload payload, ResultWrite write) const;
  absl::Status CheckTouched(const std::vector<BlockRows>& list, int operand, int result) const;
  absl::Status CheckPairs() const;

  const ExchangePlan& plan_;
  const ExchangeProblem& problem_;
  const int me_;
  const RankPlan& rank_;
  size_t step_ = 0;
};

std::string RankForm::WhatIsWrongWith(const SlotSpec& slot) const {
  const auto payload = static_cast<int>(slot.payload);
  if (payload < 0 || payload >= kPayloads) return "has an unknown payload";
  if (IsResult(slot.payload) && !HasResult(slot.payload)) return "is of the other pass";
  if (!IsResult(slot.payload) && slot.width != Width::kAccumulator) return "gives an operand a width";
  if (slot.home && slot.span != Span::kBlock) return "is home to more than a block";
  if (plan_.groups.size() > 1 && slot.home) {
    return slot.group == kAllHeads ? "" : "is home to part of the heads";
  }
  if (!InRange(slot.group, plan_.groups.size())) return absl::StrCat("is of head group ", slot.group);
  if (slot.span == Span::kSuper && plan_.super_rows.empty()) return "needs super_rows";
  return "";
}

absl::Status RankForm::CheckSlots() const {
  const std::string where = absl::StrCat(plan_.name, ": rank ", me_);
  std::vector<int> homes(kPayloads);
  for (size_t s = 0; s < rank_.slots.size(); ++s) {
    const std::string wrong = WhatIsWrongWith(rank_.slots[s]);
    if (!wrong.empty()) return absl::FailedPreconditionError(absl::StrCat(where, " slot ", s, " ", wrong));
    if (rank_.slots[s].home) ++homes[static_cast<size_t>(rank_.slots[s].payload)];
  }
  for (int p = 0; p < kPayloads; ++p) {
    const Payload payload = static_cast<Payload>(p);
    const int least = IsResult(payload) && HasResult(payload) ? 1 : 0;
    const int count = homes[static_cast<size_t>(p)];
    if (least <= count && count <= 1) continue;
    return absl::FailedPreconditionError(absl::StrCat(where, " has ", count, " home slots of ", Name(payload),
                                                      ": expected ", least ? "1" : "0 or 1"));
  }
  return absl::OkStatus();
}

absl::Status RankForm::CheckStep() const {
  for (const int before : step().after) {
    if (!InRange(before, step_)) return Wrong("waits for step ", before, ": expected an earlier step");
  }
  switch (step().kind) {
    case StepKind::kAttend:
      return CheckAttend();
    case StepKind::kCopy:
    case StepKind::kReduce:
      return CheckCopy();
    case StepKind::kSend:
    case StepKind::kReceive:
      return CheckTransfer();
  }
  return Wrong("there is no such kind of step");
}

absl::Status RankForm::CheckSlot(int slot) const {
  if (!InRange(slot, rank_.slots.size())) return Wrong("there is no slot ", slot);
  const int group = spec(slot).group;
  if (group != kAllHeads && plan_.groups[static_cast<size_t>(group)].q_heads() == 0)
    return Wrong("slot ", slot, " is of head group ", group, ", which has no heads");
  return absl::OkStatus();
}

absl::Status RankForm::CheckRows(int slot, const BlockRows& rows) const {
  if (!InRange(rows.block, plan_.ranks.size())) return Wrong("there is no block ", rows.block);
  if (rows.rows.empty() || !Contains({0, problem_.block_rows}, rows.rows)) {
    return Wrong("rows ", RowsText(rows.rows), ": expected some inside [0, ", problem_.block_rows, ")");
  }
  if (spec(slot).home && rows.block != me_) {
    return Wrong("slot ", slot, " is home of block ", me_, ", not of block ", rows.block);
  }
  if (spec(slot).span == Span::kSuper && ChunkOf(problem_, rows) < 0) {
    return Wrong(RowsText(rows), ": expected rows of one chunk in slot ", slot, ", which has a super-block");
  }
  return absl::OkStatus();
}

absl::Status RankForm::CheckWritten(int slot) const {
  if (!spec(slot).home || IsResult(spec(slot).payload)) return absl::OkStatus();
  return Wrong("writes to slot ", slot, ", a home operand");
}

bool RankForm::OwnsKvHeads(int group) const {
  std::vector<int> uses(static_cast<size_t>(problem_.kv_heads));
  for (const HeadGroup& each : plan_.groups) {
    for (const int64_t head : each.kv_heads) ++uses[static_cast<size_t>(head)];
  }
  const std::vector<int64_t>& heads = plan_.groups[static_cast<size_t>(group)].kv_heads;
  return std::all_of(heads.begin(), heads.end(),
                     [&](int64_t head) { return uses[static_cast<size_t>(head)] == 1; });
}

// kCopy, kReduce.
absl::Status RankForm::CheckCopy() const {
  for (const int slot : {step().slot, step().into}) {
    ANNULUS_RETURN_IF_ERROR(CheckSlot(slot));
    ANNULUS_RETURN_IF_ERROR(CheckRows(slot, step().rows));
  }
  ANNULUS_RETURN_IF_ERROR(CheckWritten(step().into));
  const SlotSpec &from = spec(step().slot), &into = spec(step().into);
  const bool reduces = step().kind == StepKind::kReduce;
  if (step().slot == step().into) return Wrong("moves slot ", step().slot, " to itself");
  if (from.payload != into.payload)
    return Wrong("slots ", step().slot, " and ", step().into, " hold different things");
  if (reduces && !IsResult(from.payload)) return Wrong("adds up operands");
  if (reduces && into.width != Width::kAccumulator)
    return Wrong("adds to slot ", step().into, ", which is rounded");
  if (from.group == into.group) return absl::OkStatus();
  if (from.group != kAllHeads && into.group != kAllHeads)
    return Wrong("slots ", step().slot, " and ", step().into, " are of different head groups");
  if (from.group == kAllHeads && IsResult(from.payload))
    return Wrong("takes a head group out of a home result");
  if (!reduces && into.payload == Payload::kKvGrad && !OwnsKvHeads(from.group)) {
    return Wrong(
        "overwrites kv heads that another head group or head of the group has, too: expected an "
        "addition");
  }
  return absl::OkStatus();
}

absl::Status RankForm::CheckTransfer() const {
  ANNULUS_RETURN_IF_ERROR(CheckSlot(step().slot));
  ANNULUS_RETURN_IF_ERROR(CheckRows(step().slot, step().rows));
  if (step().kind == StepKind::kReceive) ANNULUS_RETURN_IF_ERROR(CheckWritten(step().slot));
  if (!InRange(step().peer, plan_.ranks.size()) || step().peer == me_)
    return Wrong("expected another rank as peer");
  if (step().message < 0) return Wrong("expected a message number of at least 0");
  return absl::OkStatus();
}

absl::Status RankForm::CheckOperand(int slot, Payload payload) const {
  ANNULUS_RETURN_IF_ERROR(CheckSlot(slot));
  const int group = spec(slot).group;
  if (spec(slot).payload != payload) return Wrong("slot ", slot, " does not hold a ", Name(payload));
  if (group == kAllHeads) return Wrong("slot ", slot, " holds all heads: expected one head group");
  if (group != spec(step().attend.q_result).group)
    return Wrong("slots ", slot, " and ", step().attend.q_result, " are of different head groups");
  return absl::OkStatus();
}

absl::Status RankForm::CheckResult(int slot, Payload payload, ResultWrite write) const {
  ANNULUS_RETURN_IF_ERROR(CheckOperand(slot, payload));
  if (write != ResultWrite::kOverwrite && spec(slot).width != Width::kAccumulator)
    return Wrong("adds to slot ", slot, ", which is rounded");
  return absl::OkStatus();
}

absl::Status RankForm::CheckTouched(const std::vector<BlockRows>& list, int operand, int result) const {
  for (const BlockRows& rows : list) {
    for (const int slot : {operand, result}) {
      if (slot < 0) continue;
      ANNULUS_RETURN_IF_ERROR(CheckRows(slot, rows));
      if (spec(slot).span == Span::kBlock && rows.block != list[0].block) {
        return Wrong("slot ", slot, " has rows of one block: expected none of block ", rows.block,
                     " beside block ", list[0].block);
      }
    }
  }
  return absl::OkStatus();
}

absl::Status RankForm::CheckAttend() const {
  const Attend& attend = step().attend;
  const bool backward = plan_.pass == Pass::kBackward;
  ANNULUS_RETURN_IF_ERROR(CheckSlot(attend.q_result));
  ANNULUS_RETURN_IF_ERROR(CheckOperand(attend.q_slot, Payload::kQuery));
  ANNULUS_RETURN_IF_ERROR(CheckOperand(attend.kv_slot, Payload::kKv));
  ANNULUS_RETURN_IF_ERROR(
      CheckResult(attend.q_result, backward ? Payload::kQueryGrad : Payload::kOutput, attend.q_write));
  if (backward) {
    ANNULUS_RETURN_IF_ERROR(CheckResult(attend.kv_result, Payload::kKvGrad, attend.kv_write));
  } else if (attend.kv_result != -1) {
    return Wrong("a forward plan has kv gradients in slot ", attend.kv_result);
  }
  if (attend.arrival == KeyArrival::kDuring && (backward || spec(attend.kv_slot).home))
    return Wrong("takes keys as they come: expected a forward plan, and a KV slot that receives");
  ANNULUS_RETURN_IF_ERROR(CheckTouched(attend.q_rows, attend.q_slot, attend.q_result));
  ANNULUS_RETURN_IF_ERROR(CheckTouched(attend.kv_rows, attend.kv_slot, attend.kv_result));
  return CheckPairs();
}

absl::Status RankForm::CheckPairs() const {
  const Attend& attend = step().attend;
  const auto covers = [](const std::vector<BlockRows>& list, int block, const RowRange& rows) {
    return std::any_of(list.begin(), list.end(), [&](const BlockRows& each) {
      return each.block == block && Contains(each.rows, rows);
    });
  };
  int queries_of = -1;                                    // pairs often share their queries
  std::vector<RowRange> keys_of(problem_.chunks.size());  // and keys
  for (const BlockPair& pair : attend.pairs) {
    if (!InRange(pair.q_chunk, problem_.chunks.size()) || !InRange(pair.kv_chunk, problem_.chunks.size()))
      return Wrong("there is no chunk ", pair.q_chunk, " or ", pair.kv_chunk);
    const size_t i = static_cast<size_t>(pair.q_chunk), j = static_cast<size_t>(pair.kv_chunk);
    if (pair.keys.empty() || !(pair.keys == problem_.keys_of(i, j)) ||
        pair.pairs != problem_.pairs_of(i, j)) {
      return Wrong("chunk ", i, " against rows ", RowsText(pair.keys), " of chunk ", j, ", ", pair.pairs,
                   " pairs: the problem has rows ", RowsText(problem_.keys_of(i, j)), ", ",
                   problem_.pairs_of(i, j), " pairs");
    }
    if (pair.q_chunk != queries_of &&
        !covers(attend.q_rows, problem_.chunks[i].owner, problem_.chunks[i].rows))
      return Wrong("queries of chunk ", i, " are not in its rows");
    queries_of = pair.q_chunk;
    if (keys_of[j] == pair.keys) continue;
    keys_of[j] = pair.keys;
    if (!covers(attend.kv_rows, problem_.chunks[j].owner, pair.keys))
      return Wrong("keys ", RowsText(pair.keys), " of chunk ", j, " are not in its rows");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckForm(const ExchangePlan& plan) {
  ANNULUS_RETURN_IF_ERROR(ProblemForm(plan).Check());
  for (size_t r = 0; r < plan.ranks.size(); ++r)
    ANNULUS_RETURN_IF_ERROR(RankForm(plan, static_cast<int>(r)).Check());
  return absl::OkStatus();
}

}  // namespace annulus
