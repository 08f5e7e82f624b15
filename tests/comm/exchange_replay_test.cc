// Plans of every kind run in random orders on integers, so that every contribution can be told: the result of
// a query is the sum, over the keys that it sees, of a number that only this pair and head have; gradients
// likewise.

#include "annulus/comm/exchange_replay.h"

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <random>

#include "annulus/comm/exchange_build.h"

namespace annulus {
namespace {

// Rows of blocks as numbers: operands hold, for each head, the global row's name; results sums.
struct Case {
  int ranks = 1;
  int64_t rows = 6;  // of a block
  int64_t heads = 1, kv_heads = 1;
  int chunks = 2;  // of a rank, each cut in `parts`
  int parts = 1;
  uint64_t seed = 0;
};

// Chunks as in zigzag layouts; random key ranges.
ExchangeProblem ProblemOf(const Case& c) {
  std::mt19937_64 random(c.seed);
  ExchangeProblem problem{.ranks = c.ranks,
                          .block_rows = c.rows,
                          .heads = c.heads,
                          .kv_heads = c.kv_heads,
                          .chunks = {},
                          .keys = {},
                          .pairs = {}};
  for (int r = 0; r < c.ranks; ++r) {
    int64_t row = 0;
    for (int k = 0; k < c.chunks * c.parts; ++k) {
      const int64_t end = c.rows * (k + 1) / (c.chunks * c.parts);
      const int order = k / c.parts % 2 == 0 ? r : 2 * c.ranks - 1 - r;
      problem.chunks.push_back(
          {r, {row, end}, (k / c.parts / 2 * 2 * c.ranks + order) * 1000 + k % c.parts, k % c.parts});
      row = end;
    }
  }
  for (size_t i = 0; i < problem.chunks.size(); ++i) {
    for (size_t j = 0; j < problem.chunks.size(); ++j) {
      const RowRange& rows = problem.chunks[j].rows;
      RowRange keys{0, 0};
      if (!rows.empty() && !problem.chunks[i].rows.empty() && random() % 4 != 0) {
        keys.begin = rows.begin + static_cast<int64_t>(random() % static_cast<uint64_t>(rows.size()));
        keys.end =
            keys.begin + 1 + static_cast<int64_t>(random() % static_cast<uint64_t>(rows.end - keys.begin));
        if (random() % 2 == 0) keys = rows;
      }
      problem.keys.push_back(keys);
      problem.pairs.push_back(keys.size() * problem.chunks[i].rows.size());
    }
  }
  return problem;
}

int64_t NumberOf(int64_t a, int64_t b, int64_t head, int salt) {
  uint64_t h = static_cast<uint64_t>(a) * 0x9E3779B97F4A7C15u +
               static_cast<uint64_t>(b) * 0xC2B2AE3D27D4EB4Fu +
               static_cast<uint64_t>(head) * 0x165667B19E3779F9u + static_cast<uint64_t>(salt);
  h ^= h >> 29;
  return static_cast<int64_t>(h * 0xBF58476D1CE4E5B9u >> 20);
}

// One rank: slots of i64 [rows, heads of the slot].
class NumberRank {
 public:
  NumberRank(const ExchangePlan& plan, int cp_rank)
      : plan_(plan), rank_(plan.ranks[static_cast<size_t>(cp_rank)]) {
    for (const SlotSpec& spec : rank_.slots) {
      const int64_t heads = static_cast<int64_t>(HeadsOf(spec).size());
      memory_.push_back(std::make_unique<std::vector<int64_t>>(
          static_cast<size_t>(SlotRows(plan, spec) * heads), spec.home && IsResult(spec.payload) ? 0 : -7));
      binding_.slots.push_back({.fields = {TensorRef(memory_.back()->data(), DType::kI64, Device{},
                                                     Shape{SlotRows(plan, spec), heads})}});
      if (!spec.home || IsResult(spec.payload)) continue;
      for (int64_t row = 0; row < plan.problem.block_rows; ++row) {
        for (int64_t h = 0; h < heads; ++h) *At(binding_.slots.size() - 1, row, h) = NameOf(cp_rank, row, h);
      }
    }
    binding_.compute = [this](const Step& step) { return Compute(step); };
  }

  const ExchangeBinding& binding() const { return binding_; }
  // Of a home slot.
  int64_t Home(Payload payload, int64_t row, int64_t head) const {
    for (size_t s = 0; s < rank_.slots.size(); ++s) {
      if (rank_.slots[s].home && rank_.slots[s].payload == payload) return *At(s, row, head);
    }
    ADD_FAILURE() << "no home slot";
    return -1;
  }
  static int64_t NameOf(int64_t owner, int64_t row, int64_t head) {
    return (owner * 4096 + row) * 4096 + head;
  }

 private:
  // The model's heads that a slot holds, by their index in it; a name of each even if one is there twice.
  std::vector<int64_t> HeadsOf(const SlotSpec& spec) const {
    const bool kv = spec.payload == Payload::kKv || spec.payload == Payload::kKvGrad;
    std::vector<int64_t> heads;
    if (spec.group == kAllHeads) {
      for (int64_t h = 0; h < (kv ? plan_.problem.kv_heads : plan_.problem.heads); ++h) heads.push_back(h);
      return heads;
    }
    const HeadGroup& group = plan_.groups[static_cast<size_t>(spec.group)];
    if (kv) return group.kv_heads;
    for (int64_t h = group.q_begin; h < group.q_end; ++h) heads.push_back(h);
    return heads;
  }
  int64_t* At(size_t slot, int64_t row, int64_t head) const {
    const TensorRef& tensor = binding_.slots[slot].fields[0];
    return tensor.data<int64_t>() + row * tensor.dim(1) + head;
  }
  int64_t* At(int slot, int block, int64_t row, int64_t head) const {
    const SlotSpec& spec = rank_.slots[static_cast<size_t>(slot)];
    return At(static_cast<size_t>(slot), RowInSlot(plan_, spec, {block, {row, row + 1}}), head);
  }
  void Empty(int slot, const std::vector<BlockRows>& list) {
    for (const BlockRows& rows : list) {
      for (int64_t row = rows.rows.begin; row < rows.rows.end; ++row) {
        for (int64_t h = 0; h < binding_.slots[static_cast<size_t>(slot)].fields[0].dim(1); ++h)
          *At(slot, rows.block, row, h) = 0;
      }
    }
  }

  absl::Status Compute(const Step& step) {
    if (step.kind == StepKind::kAttend) {
      AttendTo(step.attend);
      return absl::OkStatus();
    }
    const SlotSpec& source = rank_.slots[static_cast<size_t>(step.slot)];
    const SlotSpec& target_slot = rank_.slots[static_cast<size_t>(step.into)];
    const std::vector<int64_t> from = HeadsOf(source), into = HeadsOf(target_slot);
    const bool alike = source.group == target_slot.group;  // then a head that is there twice is two
    for (int64_t row = step.rows.rows.begin; row < step.rows.rows.end; ++row) {
      for (size_t a = 0; a < from.size(); ++a) {
        for (size_t b = 0; b < into.size(); ++b) {
          if (alike ? a != b : from[a] != into[b]) continue;
          const int64_t value = *At(step.slot, step.rows.block, row, static_cast<int64_t>(a));
          int64_t& target = *At(step.into, step.rows.block, row, static_cast<int64_t>(b));
          target = step.kind == StepKind::kCopy ? value : target + value;
        }
      }
    }
    return absl::OkStatus();
  }

  void AttendTo(const Attend& attend) {
    if (attend.q_write == ResultWrite::kOverwrite) Empty(attend.q_result, attend.q_rows);
    if (attend.kv_write == ResultWrite::kOverwrite) Empty(attend.kv_result, attend.kv_rows);
    const std::vector<int64_t> heads = HeadsOf(rank_.slots[static_cast<size_t>(attend.q_slot)]);
    const int64_t kv_heads =
        static_cast<int64_t>(HeadsOf(rank_.slots[static_cast<size_t>(attend.kv_slot)]).size());
    for (const BlockPair& pair : attend.pairs) {
      const Chunk& q_chunk = plan_.problem.chunks[static_cast<size_t>(pair.q_chunk)];
      const int kv_block = plan_.problem.chunks[static_cast<size_t>(pair.kv_chunk)].owner;
      for (int64_t q_row = q_chunk.rows.begin; q_row < q_chunk.rows.end; ++q_row) {
        for (int64_t row = pair.keys.begin; row < pair.keys.end; ++row) {
          for (int64_t h = 0; h < static_cast<int64_t>(heads.size()); ++h) {
            const int64_t kv_head = h * kv_heads / static_cast<int64_t>(heads.size());
            const int64_t q = *At(attend.q_slot, q_chunk.owner, q_row, h);
            const int64_t kv = *At(attend.kv_slot, kv_block, row, kv_head);
            *At(attend.q_result, q_chunk.owner, q_row, h) += NumberOf(q, kv, 0, 1);
            if (attend.kv_result < 0) continue;
            *At(attend.kv_result, kv_block, row, kv_head) += NumberOf(q, kv, 0, 2);
          }
        }
      }
    }
  }

  const ExchangePlan& plan_;
  const RankPlan& rank_;
  std::vector<std::unique_ptr<std::vector<int64_t>>> memory_;
  ExchangeBinding binding_;
};

// [rank * rows + row, head] of what must come out.
std::map<std::array<int64_t, 3>, int64_t> Expected(const ExchangeProblem& problem, bool of_queries) {
  std::map<std::array<int64_t, 3>, int64_t> sums;
  for (size_t i = 0; i < problem.chunks.size(); ++i) {
    for (size_t j = 0; j < problem.chunks.size(); ++j) {
      const RowRange& keys = problem.keys_of(i, j);
      for (int64_t q = problem.chunks[i].rows.begin; q < problem.chunks[i].rows.end; ++q) {
        for (int64_t k = keys.begin; k < keys.end; ++k) {
          for (int64_t h = 0; h < problem.heads; ++h) {
            const int64_t kv_head = h / (problem.heads / problem.kv_heads);
            const int64_t q_name = NumberRank::NameOf(problem.chunks[i].owner, q, h);
            const int64_t kv_name = NumberRank::NameOf(problem.chunks[j].owner, k, kv_head);
            if (of_queries) {
              sums[{problem.chunks[i].owner, q, h}] += NumberOf(q_name, kv_name, 0, 1);
            } else {
              sums[{problem.chunks[j].owner, k, kv_head}] += NumberOf(q_name, kv_name, 0, 2);
            }
          }
        }
      }
    }
  }
  return sums;
}

void CheckPlan(const ExchangePlan& plan, uint64_t seed) {
  std::vector<std::unique_ptr<NumberRank>> ranks;
  std::vector<ExchangeBinding> bindings;
  for (int r = 0; r < plan.problem.ranks; ++r) {
    ranks.push_back(std::make_unique<NumberRank>(plan, r));
    bindings.push_back(ranks.back()->binding());
  }
  ASSERT_EQ(Replay(plan, bindings, seed), absl::OkStatus());
  const bool forward = plan.pass == Pass::kForward;
  auto queries = Expected(plan.problem, true), keys = Expected(plan.problem, false);
  for (int r = 0; r < plan.problem.ranks; ++r) {
    for (int64_t row = 0; row < plan.problem.block_rows; ++row) {
      for (int64_t h = 0; h < plan.problem.heads; ++h) {
        ASSERT_EQ(
            ranks[static_cast<size_t>(r)]->Home(forward ? Payload::kOutput : Payload::kQueryGrad, row, h),
            (queries[{r, row, h}]))
            << "rank " << r << " row " << row << " head " << h;
      }
      for (int64_t h = 0; !forward && h < plan.problem.kv_heads; ++h) {
        ASSERT_EQ(ranks[static_cast<size_t>(r)]->Home(Payload::kKvGrad, row, h), (keys[{r, row, h}]))
            << "rank " << r << " row " << row << " KV head " << h;
      }
    }
  }
}

class ReplayTest : public testing::TestWithParam<int> {};

TEST_P(ReplayTest, EveryChoiceIsExactInAnyOrder) {
  const int ranks = GetParam();
  struct Heads {
    int64_t heads, kv_heads;
  };
  for (const Heads& h : {Heads{1, 1}, Heads{8, 2}, Heads{5, 5}, Heads{9, 3}}) {
    for (PlanChoice choice : AllChoices(ranks, h.heads)) {
      for (const int parts : {1, 2}) {
        for (const uint64_t seed : {1u, 2u, 3u}) {
          choice.parts = parts;
          choice.buffers = seed == 2 ? 3 : 2;
          Case c{.ranks = ranks, .rows = 7, .heads = h.heads, .kv_heads = h.kv_heads, .seed = seed};
          c.chunks = seed == 3 ? 1 : 2;
          c.parts = ChunkParts(choice);
          const ExchangeProblem problem = ProblemOf(c);
          for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
            SCOPED_TRACE(absl::StrCat(NameOf(choice, ranks), ", pass ", static_cast<int>(pass), ", heads ",
                                      h.heads, ":", h.kv_heads, ", seed ", seed));
            const absl::StatusOr<ExchangePlan> plan = BuildPlan(problem, pass, choice);
            ASSERT_EQ(plan.status(), absl::OkStatus());
            CheckPlan(*plan, seed);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, ReplayTest, testing::Values(1, 2, 3, 4, 5, 6, 8));

}  // namespace
}  // namespace annulus
