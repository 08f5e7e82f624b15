// Heads split over neighbouring ranks. Place c of the plan between super-blocks is the ranks c * split + h,
// h < split, each for head group h of the super-block that these ranks hold together:
//
//   rank c * split + h:  pack the other groups' heads, send them     gather: sequence -> heads
//                        receive group h of all members' rows
//                        the steps of place c, with rank c' * split + h for each place c'
//                        send the members their rows of the results  scatter: heads -> sequence
//
// With one place this is Ulysses.

#include <algorithm>
#include <array>
#include <map>
#include <tuple>
#include <unordered_map>

#include "row_set.h"
#include "scheme.h"

namespace annulus {
namespace {

// Query heads [begin, end) with as few KV heads as a constant number of query heads for each allows.
HeadGroup GroupOf(const ExchangeProblem& problem, int64_t begin, int64_t end) {
  HeadGroup group{.q_begin = begin, .q_end = end};
  const int64_t ratio = problem.heads / problem.kv_heads;
  for (int64_t run = end - begin; run >= 1; --run) {
    if ((end - begin) % run != 0) continue;
    bool alike = true;
    for (int64_t head = begin; head < end && alike; head += run)
      alike = head / ratio == (head + run - 1) / ratio;
    if (!alike) continue;
    for (int64_t head = begin; head < end; head += run) group.kv_heads.push_back(head / ratio);
    break;
  }
  return group;
}

bool SharesKvHeads(const std::vector<HeadGroup>& groups, int64_t kv_heads) {
  std::vector<int> uses(static_cast<size_t>(kv_heads));
  for (const HeadGroup& group : groups) {
    for (const int64_t head : group.kv_heads) ++uses[static_cast<size_t>(head)];
  }
  return std::any_of(uses.begin(), uses.end(), [](int count) { return count > 1; });
}

// The problem between super-blocks; its chunks are the same in another order.
struct Between {
  ExchangeProblem problem;
  std::vector<size_t> chunk;  // by its chunk: the one of the blocks' problem
};

Between JoinBlocks(const ExchangeProblem& problem, int split) {
  Between between{.problem = {.ranks = problem.ranks / split,
                              .block_rows = problem.block_rows * split,
                              .heads = problem.heads,
                              .kv_heads = problem.kv_heads,
                              .chunks = {},
                              .keys = {},
                              .pairs = {}},
                  .chunk = {}};
  for (size_t k = 0; k < problem.chunks.size(); ++k) between.chunk.push_back(k);
  std::stable_sort(between.chunk.begin(), between.chunk.end(), [&](size_t a, size_t b) {
    const Chunk &x = problem.chunks[a], &y = problem.chunks[b];
    return std::tuple(x.owner / split, x.position) < std::tuple(y.owner / split, y.position);
  });
  int64_t row = 0;
  for (const size_t k : between.chunk) {
    Chunk chunk = problem.chunks[k];
    chunk.owner /= split;
    if (!between.problem.chunks.empty() && between.problem.chunks.back().owner != chunk.owner) row = 0;
    chunk.rows = {row, row + chunk.rows.size()};
    row = chunk.rows.end;
    between.problem.chunks.push_back(chunk);
  }
  for (const size_t i : between.chunk) {
    for (size_t j = 0; j < between.chunk.size(); ++j) {
      const size_t from = between.chunk[j];
      RowRange keys = problem.keys_of(i, from);
      const int64_t shift = between.problem.chunks[j].rows.begin - problem.chunks[from].rows.begin;
      if (!keys.empty()) keys = {keys.begin + shift, keys.end + shift};
      between.problem.keys.push_back(keys);
      between.problem.pairs.push_back(problem.pairs_of(i, from));
    }
  }
  return between;
}

constexpr std::array<Payload, 2> kOperands = {Payload::kQuery, Payload::kKv};

// What all ranks share.
struct Split {
  const ExchangeProblem& problem;
  const Between& between;
  const ExchangePlan& inner;  // of the places
  const std::vector<HeadGroup>& groups;
  int split;
  std::vector<Payload> results;
  std::map<Payload, Width> width;    // of results in super-blocks and at home
  std::map<Payload, StepKind> home;  // how they come into the home slot

  // Ordered numbers that both ends of a message find; made dense at the end.
  enum class Leg { kGather, kBetween, kScatter };
  using MessageKey = std::tuple<Leg, int, int, size_t>;  // leg, payload or number between, group, chunk
  struct MessageHash {
    size_t operator()(const MessageKey& key) const {
      const auto [leg, what, group, chunk] = key;
      constexpr size_t kOdd = 0x9e3779b97f4a7c15;
      return (((static_cast<size_t>(leg) * kOdd + static_cast<size_t>(what)) * kOdd +
               static_cast<size_t>(group)) *
                  kOdd +
              chunk) *
             kOdd;
    }
  };
  std::unordered_map<MessageKey, int, MessageHash> messages = {};
  int MessageOf(Leg leg, int what, int group, size_t chunk) {
    return messages.try_emplace({leg, what, group, chunk}, static_cast<int>(messages.size())).first->second;
  }
};

class SplitRank {
 public:
  SplitRank(Split* split, int cp_rank)
      : s_(*split), me_(cp_rank), place_(cp_rank / s_.split), group_(cp_rank % s_.split) {}

  RankPlan Build() {
    for (const Payload payload : kOperands)
      home_[payload] = AddSlot({.payload = payload, .home = true, .group = kAllHeads});
    for (const Payload payload : s_.results) {
      home_[payload] =
          AddSlot({.payload = payload, .home = true, .group = kAllHeads, .width = s_.width.at(payload)});
    }
    if (!GroupEmpty(group_)) AddInnerSlots();
    for (const Payload payload : kOperands) Gather(payload);
    if (!GroupEmpty(group_)) AddInnerSteps();
    for (const Payload payload : s_.results) Scatter(payload);
    return std::move(plan_);
  }

 private:
  const RankPlan& inner() const { return s_.inner.ranks[static_cast<size_t>(place_)]; }
  bool GroupEmpty(int group) const { return s_.groups[static_cast<size_t>(group)].q_heads() == 0; }
  int RankOf(int group) const { return place_ * s_.split + group; }
  int AddSlot(const SlotSpec& spec) {
    plan_.slots.push_back(spec);
    return static_cast<int>(plan_.slots.size()) - 1;
  }
  int Add(Step step) {
    std::sort(step.after.begin(), step.after.end());
    step.after.erase(std::unique(step.after.begin(), step.after.end()), step.after.end());
    plan_.steps.push_back(std::move(step));
    return static_cast<int>(plan_.steps.size()) - 1;
  }
  BlockRows RowsOf(size_t chunk) const {
    return {s_.problem.chunks[chunk].owner, s_.problem.chunks[chunk].rows};
  }
  // Chunks that have rows: of one block, or of this place's super-block.
  template <typename Wanted>
  std::vector<size_t> ChunksWhere(const Wanted& wanted) const {
    std::vector<size_t> chunks;
    for (size_t k = 0; k < s_.problem.chunks.size(); ++k) {
      if (!s_.problem.chunks[k].rows.empty() && wanted(s_.problem.chunks[k])) chunks.push_back(k);
    }
    return chunks;
  }
  std::vector<size_t> ChunksOfBlock(int block) const {
    return ChunksWhere([=](const Chunk& chunk) { return chunk.owner == block; });
  }
  std::vector<size_t> ChunksOfPlace() const {
    return ChunksWhere([this](const Chunk& chunk) { return chunk.owner / s_.split == place_; });
  }

  void AddInnerSlots() {
    for (const SlotSpec& spec : inner().slots) {
      SlotSpec slot{.payload = spec.payload, .group = group_, .span = Span::kSuper, .width = spec.width};
      if (spec.home && IsResult(spec.payload)) slot.width = s_.width.at(spec.payload);
      slots_.push_back(AddSlot(slot));
      if (spec.home) super_[spec.payload] = slots_.back();
    }
  }

  void Gather(Payload payload) {
    const int what = static_cast<int>(payload);
    const std::vector<size_t> own = ChunksOfBlock(me_);
    for (int i = 1; i < s_.split; ++i) {
      const int group = (group_ + i) % s_.split;
      if (GroupEmpty(group)) continue;
      const int packed = AddSlot({.payload = payload, .group = group});
      const int copy = Add({.kind = StepKind::kCopy,
                            .slot = home_[payload],
                            .into = packed,
                            .rows = {me_, {0, s_.problem.block_rows}}});
      for (const size_t chunk : own) {
        Add({.kind = StepKind::kSend,
             .slot = packed,
             .rows = RowsOf(chunk),
             .peer = RankOf(group),
             .message = s_.MessageOf(Split::Leg::kGather, what, group, chunk),
             .after = {copy}});
      }
    }
    if (GroupEmpty(group_)) return;
    for (const size_t chunk : own) {
      gathered_[{payload, chunk}] = Add(
          {.kind = StepKind::kCopy, .slot = home_[payload], .into = super_[payload], .rows = RowsOf(chunk)});
    }
    for (const size_t chunk : ChunksOfPlace()) {
      if (RowsOf(chunk).block == me_) continue;
      gathered_[{payload, chunk}] = Add({.kind = StepKind::kReceive,
                                         .slot = super_[payload],
                                         .rows = RowsOf(chunk),
                                         .peer = RowsOf(chunk).block,
                                         .message = s_.MessageOf(Split::Leg::kGather, what, group_, chunk)});
    }
  }

  // ---- Steps between super-blocks -----------------------------------------------------------------

  // The parts of rows of a super-block that lie in one chunk each, as rows of its block.
  struct Part {
    size_t chunk;
    BlockRows rows;
  };
  std::vector<Part> PartsOf(const BlockRows& rows) const {
    std::vector<Part> parts;
    const std::vector<Chunk>& chunks = s_.between.problem.chunks;  // in order of their owners
    const auto first = std::lower_bound(chunks.begin(), chunks.end(), rows.block,
                                        [](const Chunk& chunk, int block) { return chunk.owner < block; });
    for (auto k = static_cast<size_t>(first - chunks.begin()); k < chunks.size(); ++k) {
      const Chunk& joined = chunks[k];
      if (joined.owner != rows.block) break;
      if (joined.rows.empty() || !Overlap(joined.rows, rows.rows)) continue;
      const Chunk& chunk = s_.problem.chunks[s_.between.chunk[k]];
      const int64_t shift = chunk.rows.begin - joined.rows.begin;
      parts.push_back({s_.between.chunk[k],
                       {chunk.owner,
                        {std::max(joined.rows.begin, rows.rows.begin) + shift,
                         std::min(joined.rows.end, rows.rows.end) + shift}}});
    }
    return parts;
  }
  std::vector<BlockRows> RowsOfParts(const std::vector<BlockRows>& list) const {
    std::vector<BlockRows> rows;
    for (const BlockRows& each : list) {
      for (const Part& part : PartsOf(each)) rows.push_back(part.rows);
    }
    return rows;
  }
  bool IsHomeOperand(int slot) const {
    const SlotSpec& spec = inner().slots[static_cast<size_t>(slot)];
    return spec.home && !IsResult(spec.payload);
  }

  void AddInnerSteps() {
    EmptyResults();
    std::vector<std::vector<int>> added;  // by inner step
    for (const Step& step : inner().steps) {
      std::vector<int> after;
      for (const int before : step.after) {
        const std::vector<int>& ids = added[static_cast<size_t>(before)];
        after.insert(after.end(), ids.begin(), ids.end());
      }
      added.push_back(step.kind == StepKind::kAttend ? AddAttend(step, std::move(after))
                                                     : AddParts(step, after));
    }
  }

  std::vector<int> AddAttend(const Step& inner_step, std::vector<int> after) {
    Step step = inner_step;
    step.after = std::move(after);
    Attend& attend = step.attend;
    for (int* slot : {&attend.q_slot, &attend.kv_slot}) {
      if (IsHomeOperand(*slot)) AwaitGathered(inner().slots[static_cast<size_t>(*slot)].payload, &step.after);
    }
    for (int* slot : {&attend.q_slot, &attend.kv_slot, &attend.q_result, &attend.kv_result}) {
      if (*slot >= 0) *slot = slots_[static_cast<size_t>(*slot)];
    }
    for (BlockPair& pair : attend.pairs) {
      const size_t q = s_.between.chunk[static_cast<size_t>(pair.q_chunk)];
      const size_t kv = s_.between.chunk[static_cast<size_t>(pair.kv_chunk)];
      pair = {static_cast<int>(q), static_cast<int>(kv), s_.problem.keys_of(q, kv),
              s_.problem.pairs_of(q, kv)};
    }
    attend.q_rows = RowsOfParts(attend.q_rows);
    attend.kv_rows = RowsOfParts(attend.kv_rows);
    Overwrite(Payload::kOutput, attend.q_result, &attend.q_write, &attend.q_rows);
    Overwrite(Payload::kQueryGrad, attend.q_result, &attend.q_write, &attend.q_rows);
    Overwrite(Payload::kKvGrad, attend.kv_result, &attend.kv_write, &attend.kv_rows);
    return {Add(std::move(step))};
  }

  // What is home to the plan between has no home here: its first writer empties all of its rows.
  void Overwrite(Payload payload, int slot, ResultWrite* write, std::vector<BlockRows>* rows) {
    const auto super = super_.find(payload);
    if (super == super_.end() || super->second != slot || begun_[payload]) return;
    begun_[payload] = true;
    *write = ResultWrite::kOverwrite;
    rows->clear();
    for (const size_t chunk : ChunksOfPlace()) rows->push_back(RowsOf(chunk));
  }

  // Results whose first writer is no attend begin with one that computes nothing.
  void EmptyResults() {
    Step step{.kind = StepKind::kAttend};
    for (const Payload payload : s_.results) {
      const auto touches = [&](const Step& inner_step) {
        const int slot =
            slots_[static_cast<size_t>(inner_step.kind != StepKind::kAttend ? std::max(0, inner_step.into)
                                       : payload == Payload::kKvGrad        ? inner_step.attend.kv_result
                                                                            : inner_step.attend.q_result)];
        return IsCompute(inner_step.kind) && slot == super_[payload];
      };
      const auto first = std::find_if(inner().steps.begin(), inner().steps.end(), touches);
      if (first != inner().steps.end() && first->kind == StepKind::kAttend) continue;
      const bool kv = payload == Payload::kKvGrad;
      Attend& attend = step.attend;
      (kv ? attend.kv_result : attend.q_result) = super_[payload];
      Overwrite(payload, super_[payload], kv ? &attend.kv_write : &attend.q_write,
                kv ? &attend.kv_rows : &attend.q_rows);
    }
    if (step.attend.q_result < 0 && step.attend.kv_result < 0) return;
    step.attend.q_slot = super_[Payload::kQuery];
    step.attend.kv_slot = super_[Payload::kKv];
    for (const Payload payload : s_.results) {
      int& slot = payload == Payload::kKvGrad ? step.attend.kv_result : step.attend.q_result;
      slot = super_[payload];
    }
    Add(std::move(step));
  }

  void AwaitGathered(Payload payload, std::vector<int>* after) const {
    for (const auto& [key, step] : gathered_) {
      if (key.first == payload) after->push_back(step);
    }
  }

  std::vector<int> AddParts(const Step& inner_step, const std::vector<int>& after) {
    std::vector<int> ids;
    for (const Part& part : PartsOf(inner_step.rows)) {
      Step step = inner_step;
      step.rows = part.rows;
      step.after = after;
      if (IsHomeOperand(step.slot)) {
        const Payload payload = inner().slots[static_cast<size_t>(step.slot)].payload;
        step.after.push_back(gathered_.at({payload, part.chunk}));
      }
      step.slot = slots_[static_cast<size_t>(step.slot)];
      if (step.into >= 0) step.into = slots_[static_cast<size_t>(step.into)];
      if (IsTransfer(step.kind)) {
        step.peer = inner_step.peer * s_.split + group_;
        step.message = s_.MessageOf(Split::Leg::kBetween, inner_step.message, group_, part.chunk);
      }
      ids.push_back(Add(std::move(step)));
    }
    return ids;
  }

  void Scatter(Payload payload) {
    const int what = static_cast<int>(payload);
    std::vector<int> last;
    for (size_t i = 0; i < plan_.steps.size(); ++i) {
      if (IsCompute(plan_.steps[i].kind)) last = {static_cast<int>(i)};
    }
    if (!GroupEmpty(group_)) {
      for (const size_t chunk : ChunksOfPlace()) {
        if (RowsOf(chunk).block == me_) continue;
        Add({.kind = StepKind::kSend,
             .slot = super_[payload],
             .rows = RowsOf(chunk),
             .peer = RowsOf(chunk).block,
             .message = s_.MessageOf(Split::Leg::kScatter, what, group_, chunk),
             .after = last});
      }
      for (const size_t chunk : ChunksOfBlock(me_)) {
        Add({.kind = s_.home.at(payload),
             .slot = super_[payload],
             .into = home_[payload],
             .rows = RowsOf(chunk)});
      }
    }
    for (int i = 1; i < s_.split; ++i) {
      const int group = (group_ + i) % s_.split;
      if (GroupEmpty(group)) continue;
      const int back = AddSlot({.payload = payload, .group = group, .width = s_.width.at(payload)});
      for (const size_t chunk : ChunksOfBlock(me_)) {
        const int receive = Add({.kind = StepKind::kReceive,
                                 .slot = back,
                                 .rows = RowsOf(chunk),
                                 .peer = RankOf(group),
                                 .message = s_.MessageOf(Split::Leg::kScatter, what, group, chunk)});
        Add({.kind = s_.home.at(payload),
             .slot = back,
             .into = home_[payload],
             .rows = RowsOf(chunk),
             .after = {receive}});
      }
    }
  }

  Split& s_;
  const int me_, place_, group_;
  RankPlan plan_;
  std::map<Payload, int> home_, super_;                 // slots; super: of this rank's super-block
  std::vector<int> slots_;                              // by slot of the place
  std::map<std::pair<Payload, size_t>, int> gathered_;  // steps that complete a chunk of the super-block
  std::map<Payload, bool> begun_;
};

// A single step that computes all of it can round its results.
bool ComputesAtOnce(const ExchangePlan& inner) {
  return std::all_of(inner.ranks.begin(), inner.ranks.end(), [](const RankPlan& rank) {
    return rank.steps.size() == 1 && rank.steps[0].kind == StepKind::kAttend;
  });
}

}  // namespace

ExchangePlan SplitHeads(const ExchangeProblem& problem, Pass pass, int split,
                        const std::function<ExchangePlan(const ExchangeProblem&)>& between) {
  const Between joined = JoinBlocks(problem, split);
  const ExchangePlan inner = between(joined.problem);
  ExchangePlan plan{.name = inner.name, .pass = pass, .problem = problem};
  for (int64_t h = 0; h < split; ++h)
    plan.groups.push_back(GroupOf(problem, h * problem.heads / split, (h + 1) * problem.heads / split));
  plan.super_rows.resize(problem.chunks.size());
  for (size_t k = 0; k < joined.chunk.size(); ++k)
    plan.super_rows[joined.chunk[k]] = joined.problem.chunks[k].rows.begin;
  plan.super_size = joined.problem.block_rows;

  Split shared{.problem = problem,
               .between = joined,
               .inner = inner,
               .groups = plan.groups,
               .split = split,
               .results = {},
               .width = {},
               .home = {}};
  shared.results = pass == Pass::kForward ? std::vector<Payload>{Payload::kOutput}
                                          : std::vector<Payload>{Payload::kQueryGrad, Payload::kKvGrad};
  const bool shares = SharesKvHeads(plan.groups, problem.kv_heads);
  for (const Payload payload : shared.results) {
    const bool adds = payload == Payload::kKvGrad && shares;
    shared.width[payload] = ComputesAtOnce(inner) && !adds ? Width::kCompute : Width::kAccumulator;
    shared.home[payload] = adds ? StepKind::kReduce : StepKind::kCopy;
  }
  for (int r = 0; r < problem.ranks; ++r) plan.ranks.push_back(SplitRank(&shared, r).Build());
  return plan;
}

}  // namespace annulus
