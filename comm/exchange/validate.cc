// A plan is proved in four passes, each of which may rely on those before it:
//   form      indices, rows, peers and messages are in range; each message has one send and one receive that
//   agree order     steps of one rank that touch the same rows of a slot, one of them writing, are ordered
//   progress  a run in which a send completes only with its receive reaches the end
//   content   in that run every step finds what it needs, each pair is computed once, each gradient gets home
//   once
// By `order` every possible run gives each slot the same contents, so the one run of `content` stands for
// all.

#include <algorithm>
#include <map>

#include "contents.h"
#include "plan_text.h"
#include "row_set.h"

namespace annulus {
namespace {

using Bits = std::vector<uint64_t>;

bool Has(const Bits& bits, size_t i) { return (bits[i / 64] >> (i % 64) & 1) != 0; }

class Validator {
 public:
  explicit Validator(const ExchangePlan& plan) : plan_(plan), problem_(plan.problem) {}

  absl::Status Run() {
    ANNULUS_RETURN_IF_ERROR(CheckProblem());
    ANNULUS_RETURN_IF_ERROR(CheckForm());
    ANNULUS_RETURN_IF_ERROR(CheckMessages());
    for (size_t r = 0; r < plan_.ranks.size(); ++r) ANNULUS_RETURN_IF_ERROR(CheckOrder(r));
    ANNULUS_RETURN_IF_ERROR(RunToTheEnd());
    return contents_->CheckResult();
  }

 private:
  // Rows of a slot that a step touches.
  struct Access {
    size_t step;
    int slot;
    RowRange rows;
    bool write;
  };
  struct End {
    int cp_rank = -1;
    size_t step = 0;
  };
  struct Message {
    End send, receive;
  };

  const std::vector<Step>& StepsOf(size_t r) const { return plan_.ranks[r].steps; }
  const Step& StepAt(const End& end) const { return StepsOf(static_cast<size_t>(end.cp_rank))[end.step]; }
  Payload PayloadOf(const End& end) const {
    return plan_.ranks[static_cast<size_t>(end.cp_rank)].slots[static_cast<size_t>(StepAt(end).slot)].payload;
  }
  template <typename... Args>
  absl::Status Wrong(size_t r, size_t step, const Args&... what) const {
    return absl::FailedPreconditionError(absl::StrCat(
        plan_.name, ": ", StepText(plan_, static_cast<int>(r), step), ": ", absl::StrCat(what...)));
  }
  template <typename... Args>
  absl::Status WrongProblem(const Args&... what) const {
    return absl::FailedPreconditionError(absl::StrCat(plan_.name, ": problem: ", absl::StrCat(what...)));
  }

  absl::Status CheckProblem() const;
  absl::Status CheckForm() const;
  absl::Status CheckStep(size_t r, size_t s) const;
  absl::Status CheckAttend(size_t r, size_t s) const;
  absl::Status CheckSlot(size_t r, size_t s, int slot, Payload payload) const;
  absl::Status CheckMessages();
  absl::Status CheckOrder(size_t r) const;
  std::vector<Bits> AncestorsOf(size_t r) const;
  std::vector<Access> AccessesOf(size_t r) const;
  absl::Status RunToTheEnd();
  absl::Status Advance(size_t r, std::vector<size_t>* woken);

  const ExchangePlan& plan_;
  const ExchangeProblem& problem_;
  std::map<int, Message> messages_;
  std::unique_ptr<PlanContents> contents_;
  std::vector<std::vector<bool>> done_;  // [rank][step]
};

absl::Status Validator::CheckProblem() const {
  const size_t chunks = problem_.chunks.size();
  if (problem_.ranks < 1 || problem_.block_rows < 0 ||
      plan_.ranks.size() != static_cast<size_t>(problem_.ranks)) {
    return WrongProblem(problem_.ranks, " ranks, ", problem_.block_rows, " rows a block, ",
                        plan_.ranks.size(), " rank plans");
  }
  if (problem_.keys.size() != chunks * chunks || problem_.pairs.size() != chunks * chunks) {
    return WrongProblem(chunks, " chunks, ", problem_.keys.size(), " key ranges, ", problem_.pairs.size(),
                        " costs");
  }
  size_t next = 0;
  for (int owner = 0; owner < problem_.ranks; ++owner) {
    int64_t row = 0;
    for (; next < chunks && problem_.chunks[next].owner == owner; ++next) {
      const RowRange& rows = problem_.chunks[next].rows;
      if (rows.begin != row || rows.end < rows.begin) break;
      row = rows.end;
    }
    if (row != problem_.block_rows)
      return WrongProblem("chunks do not cover the block of rank ", owner, " in order");
  }
  if (next != chunks) return WrongProblem("chunk ", next, " is out of order");
  for (size_t i = 0; i < chunks; ++i) {
    for (size_t j = 0; j < chunks; ++j) {
      const RowRange& keys = problem_.keys_of(i, j);
      if (keys.empty() ? problem_.pairs_of(i, j) != 0 : !Contains(problem_.chunks[j].rows, keys)) {
        return WrongProblem("chunk ", i, " sees rows ", RowsText(keys), " of chunk ", j, ", which has rows ",
                            RowsText(problem_.chunks[j].rows));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status Validator::CheckForm() const {
  for (size_t r = 0; r < plan_.ranks.size(); ++r) {
    for (size_t s = 0; s < StepsOf(r).size(); ++s) ANNULUS_RETURN_IF_ERROR(CheckStep(r, s));
  }
  return absl::OkStatus();
}

absl::Status Validator::CheckSlot(size_t r, size_t s, int slot, Payload payload) const {
  const std::vector<SlotSpec>& slots = plan_.ranks[r].slots;
  if (slot < 0 || slot >= static_cast<int>(slots.size())) return Wrong(r, s, "there is no slot ", slot);
  if (slots[static_cast<size_t>(slot)].payload != payload) {
    return Wrong(r, s, "slot ", slot, " does not hold ",
                 payload == Payload::kKv ? "keys and values" : "gradients");
  }
  return absl::OkStatus();
}

absl::Status Validator::CheckStep(size_t r, size_t s) const {
  const Step& step = StepsOf(r)[s];
  for (const int dependency : step.after) {
    if (dependency < 0 || dependency >= static_cast<int>(s)) {
      return Wrong(r, s, "waits for step ", dependency, ": expected an earlier step");
    }
  }
  if (step.block < 0 || step.block >= problem_.ranks) return Wrong(r, s, "there is no block ", step.block);
  if (step.rows.empty() || !Contains({0, problem_.block_rows}, step.rows)) {
    return Wrong(r, s, "expected rows inside [0, ", problem_.block_rows, ")");
  }
  switch (step.kind) {
    case StepKind::kAttend:
      return CheckAttend(r, s);
    case StepKind::kReduce:
      ANNULUS_RETURN_IF_ERROR(CheckSlot(r, s, step.slot, Payload::kKvGrad));
      ANNULUS_RETURN_IF_ERROR(CheckSlot(r, s, step.grad_slot, Payload::kKvGrad));
      return step.slot == step.grad_slot ? Wrong(r, s, "adds a slot to itself") : absl::OkStatus();
    case StepKind::kSend:
    case StepKind::kReceive: {
      const auto slots = static_cast<int>(plan_.ranks[r].slots.size());
      if (step.slot < 0 || step.slot >= slots) return Wrong(r, s, "there is no slot ", step.slot);
      const bool peer_exists = 0 <= step.peer && step.peer < problem_.ranks;
      if (!peer_exists || step.peer == static_cast<int>(r))
        return Wrong(r, s, "expected another rank as peer");
      if (step.message < 0) return Wrong(r, s, "expected a message number of at least 0");
      return absl::OkStatus();
    }
    case StepKind::kCollective:
      break;
  }
  return Wrong(r, s, "no plan has this kind of step yet");
}

absl::Status Validator::CheckAttend(size_t r, size_t s) const {
  const Step& step = StepsOf(r)[s];
  ANNULUS_RETURN_IF_ERROR(CheckSlot(r, s, step.slot, Payload::kKv));
  if (plan_.pass == Pass::kBackward) {
    ANNULUS_RETURN_IF_ERROR(CheckSlot(r, s, step.grad_slot, Payload::kKvGrad));
  } else if (step.grad_slot != -1) {
    return Wrong(r, s, "a forward plan has gradient slot ", step.grad_slot);
  }
  const auto chunks = static_cast<int>(problem_.chunks.size());
  for (const BlockPair& pair : step.pairs) {
    const bool exists =
        0 <= pair.q_chunk && pair.q_chunk < chunks && 0 <= pair.kv_chunk && pair.kv_chunk < chunks;
    if (!exists) return Wrong(r, s, "there is no chunk ", pair.q_chunk, " or ", pair.kv_chunk);
    const size_t i = static_cast<size_t>(pair.q_chunk), j = static_cast<size_t>(pair.kv_chunk);
    if (problem_.chunks[i].owner != static_cast<int>(r))
      return Wrong(r, s, "queries of another rank's chunk ", i);
    if (problem_.chunks[j].owner != step.block) return Wrong(r, s, "keys of another block's chunk ", j);
    if (!(pair.keys == problem_.keys_of(i, j)) || pair.keys.empty() ||
        pair.pairs != problem_.pairs_of(i, j)) {
      return Wrong(r, s, "chunk ", i, " against rows ", RowsText(pair.keys), " of chunk ", j, ", ",
                   pair.pairs, " pairs: the problem has rows ", RowsText(problem_.keys_of(i, j)), ", ",
                   problem_.pairs_of(i, j), " pairs");
    }
    if (!Contains(step.rows, pair.keys))
      return Wrong(r, s, "keys ", RowsText(pair.keys), " are outside its rows");
  }
  return absl::OkStatus();
}

absl::Status Validator::CheckMessages() {
  std::map<std::pair<int, int>, std::vector<int>> sent,
      received;  // (from, to): messages in order of the list
  for (size_t r = 0; r < plan_.ranks.size(); ++r) {
    for (size_t s = 0; s < StepsOf(r).size(); ++s) {
      const Step& step = StepsOf(r)[s];
      if (!IsTransfer(step.kind)) continue;
      const bool send = step.kind == StepKind::kSend;
      const int rank = static_cast<int>(r);
      End& end = send ? messages_[step.message].send : messages_[step.message].receive;
      if (end.cp_rank >= 0)
        return Wrong(r, s, "the message is that of ", StepText(plan_, end.cp_rank, end.step));
      end = {rank, s};
      if (send) sent[{rank, step.peer}].push_back(step.message);
      if (!send) received[{step.peer, rank}].push_back(step.message);
    }
  }
  for (const auto& [id, message] : messages_) {
    const End& some = message.send.cp_rank >= 0 ? message.send : message.receive;
    const size_t r = static_cast<size_t>(some.cp_rank);
    if (message.receive.cp_rank < 0) return Wrong(r, some.step, "nobody receives it");
    if (message.send.cp_rank < 0) return Wrong(r, some.step, "nobody sends it");
    const Step &send = StepAt(message.send), &receive = StepAt(message.receive);
    const bool agree = send.peer == message.receive.cp_rank && receive.peer == message.send.cp_rank &&
                       send.block == receive.block && send.rows == receive.rows &&
                       PayloadOf(message.send) == PayloadOf(message.receive);
    if (!agree) {
      return Wrong(r, some.step, "does not match ",
                   StepText(plan_, message.receive.cp_rank, message.receive.step));
    }
  }
  for (const auto& [pair, messages] : sent) {
    const std::string between =
        absl::StrCat(plan_.name, ": rank ", pair.first, " sends to rank ", pair.second);
    if (messages != received[pair]) {
      return absl::FailedPreconditionError(between + " in another order than that of its receives");
    }
    if (messages.size() > Communicator::kMaxTag) {
      return absl::FailedPreconditionError(
          absl::StrCat(between, " ", messages.size(), " messages: expected at most ", Communicator::kMaxTag));
    }
  }
  return absl::OkStatus();
}

// For each step the set of steps that are surely complete when it starts.
std::vector<Bits> Validator::AncestorsOf(size_t r) const {
  const std::vector<Step>& steps = StepsOf(r);
  std::vector<Bits> ancestors(steps.size(), Bits((steps.size() + 63) / 64));
  int last_compute = -1;
  for (size_t s = 0; s < steps.size(); ++s) {
    const auto inherit = [&](int from) {
      const size_t f = static_cast<size_t>(from);
      for (size_t word = 0; word < ancestors[s].size(); ++word) ancestors[s][word] |= ancestors[f][word];
      ancestors[s][f / 64] |= uint64_t{1} << (f % 64);
    };
    for (const int dependency : steps[s].after) inherit(dependency);
    if (!IsCompute(steps[s].kind)) continue;
    if (last_compute >= 0) inherit(last_compute);
    last_compute = static_cast<int>(s);
  }
  return ancestors;
}

std::vector<Validator::Access> Validator::AccessesOf(size_t r) const {
  std::vector<Access> accesses;
  for (size_t s = 0; s < StepsOf(r).size(); ++s) {
    const Step& step = StepsOf(r)[s];
    if (step.kind == StepKind::kAttend) {
      const bool overwrites = step.grad_write == GradWrite::kOverwrite;
      if (step.grad_slot >= 0 && overwrites) accesses.push_back({s, step.grad_slot, step.rows, true});
      for (const BlockPair& pair : step.pairs) {
        accesses.push_back({s, step.slot, pair.keys, false});
        if (step.grad_slot >= 0 && !overwrites) accesses.push_back({s, step.grad_slot, pair.keys, true});
      }
      continue;
    }
    accesses.push_back({s, step.slot, step.rows, step.kind == StepKind::kReceive});
    if (step.kind == StepKind::kReduce) accesses.push_back({s, step.grad_slot, step.rows, true});
  }
  return accesses;
}

absl::Status Validator::CheckOrder(size_t r) const {
  const std::vector<Bits> ancestors = AncestorsOf(r);
  std::vector<std::vector<Access>> of_slot(plan_.ranks[r].slots.size());
  for (const Access& access : AccessesOf(r)) of_slot[static_cast<size_t>(access.slot)].push_back(access);
  for (const std::vector<Access>& accesses : of_slot) {
    for (size_t b = 1; b < accesses.size(); ++b) {
      for (size_t a = 0; a < b; ++a) {
        const Access &first = accesses[a], &second = accesses[b];
        if (first.step == second.step || !(first.write || second.write) || !Overlap(first.rows, second.rows))
          continue;
        if (Has(ancestors[second.step], first.step)) continue;  // steps wait for earlier ones only
        return Wrong(r, second.step, "may run together with ",
                     StepText(plan_, static_cast<int>(r), first.step),
                     ", which touches the same rows of slot ", first.slot);
      }
    }
  }
  return absl::OkStatus();
}

// Completes what can be completed on rank r; `woken` gets ranks whose steps completed with it.
absl::Status Validator::Advance(size_t r, std::vector<size_t>* woken) {
  const auto ready = [&](size_t rank, size_t s) {
    const std::vector<int>& after = StepsOf(rank)[s].after;
    return std::all_of(after.begin(), after.end(),
                       [&](int d) { return done_[rank][static_cast<size_t>(d)]; });
  };
  bool computed_all_before = true;
  for (size_t s = 0; s < StepsOf(r).size(); ++s) {
    const Step& step = StepsOf(r)[s];
    if (IsCompute(step.kind)) {
      if (!done_[r][s] && computed_all_before && ready(r, s)) {
        ANNULUS_RETURN_IF_ERROR(contents_->Compute(static_cast<int>(r), s));
        done_[r][s] = true;
      }
      computed_all_before &= done_[r][s];
      continue;
    }
    if (done_[r][s] || !ready(r, s)) continue;
    const Message& message = messages_.at(step.message);
    const End& other = step.kind == StepKind::kSend ? message.receive : message.send;
    const size_t peer = static_cast<size_t>(other.cp_rank);
    if (!ready(peer, other.step)) continue;
    ANNULUS_RETURN_IF_ERROR(contents_->Move(message.send.cp_rank, message.send.step, message.receive.cp_rank,
                                            message.receive.step));
    done_[r][s] = done_[peer][other.step] = true;
    woken->push_back(peer);
  }
  return absl::OkStatus();
}

absl::Status Validator::RunToTheEnd() {
  contents_ = std::make_unique<PlanContents>(plan_);
  std::vector<size_t> work;
  for (size_t r = 0; r < plan_.ranks.size(); ++r) {
    done_.emplace_back(StepsOf(r).size());
    work.push_back(r);
  }
  // A pass over a rank's list completes all that it can, as steps wait for earlier ones only.
  while (!work.empty()) {
    const size_t r = work.back();
    work.pop_back();
    ANNULUS_RETURN_IF_ERROR(Advance(r, &work));
  }
  for (size_t r = 0; r < plan_.ranks.size(); ++r) {
    const auto stuck = std::find(done_[r].begin(), done_[r].end(), false);
    if (stuck == done_[r].end()) continue;
    return Wrong(r, static_cast<size_t>(stuck - done_[r].begin()),
                 "is never reached: ranks wait for each other");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Validate(const ExchangePlan& plan) { return Validator(plan).Run(); }

}  // namespace annulus
