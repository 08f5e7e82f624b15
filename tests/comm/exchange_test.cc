#include <gtest/gtest.h>

#include <chrono>
#include <cmath>

#include "comm/exchange_cases.h"

namespace annulus {
namespace {

using testing::CaseLayout;
using testing::CaseMask;
using testing::ExchangeCase;
using testing::ExchangeCaseMaker;

constexpr Pass kPasses[] = {Pass::kForward, Pass::kBackward};
constexpr RingDirection kDirections[] = {RingDirection::kTowardLower, RingDirection::kTowardHigher,
                                         RingDirection::kFewestBytes};

int64_t RowsSent(const ExchangePlan& plan) {
  int64_t rows = 0;
  for (int r = 0; r < plan.problem.ranks; ++r) rows += BytesSent(plan, r, 1, 1);
  return rows;
}

class Random : public ::testing::TestWithParam<int> {};

// Whatever the layout, mask and length, plans are valid, run to the right result in any order, stay within
// constant memory and move no row to a rank more often than once each way.
TEST_P(Random, KvRingsAreValid) {
  const int ranks = GetParam();
  for (uint64_t seed = 0; seed < 40; ++seed) {
    ExchangeCaseMaker maker(seed * 100 + static_cast<uint64_t>(ranks));
    const ExchangeCase made = maker.MakeRandom(ranks);
    SCOPED_TRACE(made.name + ", seed " + std::to_string(seed));
    for (const Pass pass : kPasses) {
      int64_t fewest = -1, least = -1;
      for (const RingDirection direction : kDirections) {
        const ExchangePlan plan = BuildKvRing(made.problem, pass, direction);
        const absl::Status status = Validate(plan);
        ASSERT_TRUE(status.ok()) << status << "\n" << ToString(plan);
        ASSERT_FALSE(testing::HasRace(plan)) << ToString(plan);
        if (seed < 8 || ranks <= 4) {
          ASSERT_EQ(testing::RunInRandomOrder(made, plan, seed), "") << ToString(plan);
        }
        for (const RankPlan& rank : plan.ranks)
          ASSERT_LE(rank.slots.size(), pass == Pass::kForward ? 3u : 8u);
        const int64_t rows = RowsSent(plan);
        ASSERT_LE(rows, (pass == Pass::kForward ? 1 : 2) * made.rows() * (ranks - 1));
        if (direction == RingDirection::kFewestBytes) fewest = rows;
        least = least < 0 ? rows : std::min(least, rows);
      }
      EXPECT_EQ(fewest, least);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, Random, ::testing::Range(1, 17));

// A block that skips ranks must not wait for a slot that waits for it. Here rank 0 would pass block 1 on to
// rank 4 once that has a free slot, and rank 4 would pass block 5 on to rank 0, each holding the slot that
// the other needs.
TEST(KvRing, SkippedRanksCannotWaitInACircle) {
  ExchangeCase made;
  made.problem = {.ranks = 8, .block_rows = 2, .chunks = {}, .keys = {}, .pairs = {}};
  made.problem.keys.resize(64);
  made.problem.pairs.resize(64);
  for (int r = 0; r < 8; ++r) made.problem.chunks.push_back({r, {0, 2}});
  for (const size_t rank : {0, 4}) {
    for (const size_t distance : {0, 1, 2, 5}) {
      const size_t index = rank * 8 + (rank + distance) % 8;
      made.problem.keys[index] = {0, 2};
      made.problem.pairs[index] = 4;
    }
  }
  for (int64_t q = 0; q < 16; ++q) {
    for (int64_t k = 0; k < 16; ++k)
      made.allowed.push_back(made.problem.pairs[static_cast<size_t>(q / 2 * 8 + k / 2)] > 0);
  }
  for (const Pass pass : kPasses) {
    const ExchangePlan plan = BuildKvRing(made.problem, pass, RingDirection::kTowardLower);
    EXPECT_TRUE(Validate(plan).ok()) << Validate(plan) << ToString(plan);
    for (uint64_t seed = 0; seed < 20; ++seed) EXPECT_EQ(testing::RunInRandomOrder(made, plan, seed), "");
    // Blocks 1 and 5 are sent twice by their homes instead.
    int sends = 0;
    for (const Step& step : plan.ranks[1].steps) sends += step.kind == StepKind::kSend ? 1 : 0;
    EXPECT_EQ(sends, 2);
  }
}

TEST(KvRing, CausalZigzagMovesThreeQuarters) {
  for (int ranks = 2; ranks <= 16; ++ranks) {
    const int64_t n = 8;
    const ExchangeCase made =
        ExchangeCaseMaker(1).Make(ranks, n, ranks * n, CaseLayout::kZigzag, CaseMask::kCausal);
    const int64_t full = ranks * (ranks - 1) * n;
    const ExchangePlan lower = BuildKvRing(made.problem, Pass::kForward, RingDirection::kTowardLower);
    EXPECT_EQ(4 * RowsSent(lower), 3 * full);
    EXPECT_EQ(4 * RowsSent(BuildKvRing(made.problem, Pass::kBackward, RingDirection::kTowardLower)),
              6 * full);
    EXPECT_EQ(BuildKvRing(made.problem, Pass::kForward).name, "kv_ring toward lower ranks");
    EXPECT_GT(RowsSent(BuildKvRing(made.problem, Pass::kForward, RingDirection::kTowardHigher)),
              RowsSent(lower) - (ranks == 2));
  }
}

TEST(KvRing, MovesOnlyWhatAMaskNeeds) {
  const int64_t n = 16;
  for (const int ranks : {2, 3, 5, 8}) {
    ExchangeCaseMaker maker(2);
    // Full: every block to every rank.
    const ExchangeCase full = maker.Make(ranks, n, ranks * n, CaseLayout::kContiguous, CaseMask::kFull);
    EXPECT_EQ(RowsSent(BuildKvRing(full.problem, Pass::kForward)), ranks * (ranks - 1) * n);
    EXPECT_EQ(RowsSent(BuildKvRing(full.problem, Pass::kBackward)), 2 * ranks * (ranks - 1) * n);
    // Contiguous causal: block b to the ranks above it only.
    const ExchangeCase causal = maker.Make(ranks, n, ranks * n, CaseLayout::kContiguous, CaseMask::kCausal);
    EXPECT_EQ(RowsSent(BuildKvRing(causal.problem, Pass::kForward)), ranks * (ranks - 1) / 2 * n);
    // Nothing at all for one document a rank.
    ExchangeCase own = full;
    for (size_t i = 0; i < own.problem.keys.size(); ++i) {
      if (i / own.problem.chunks.size() != i % own.problem.chunks.size())
        own.problem.keys[i] = {}, own.problem.pairs[i] = 0;
    }
    EXPECT_EQ(RowsSent(BuildKvRing(own.problem, Pass::kBackward)), 0);
  }
}

TEST(KvRing, SlotsDoNotGrowWithRanks) {
  const ExchangeCase made = ExchangeCaseMaker(3).Make(16, 4, 64, CaseLayout::kZigzag, CaseMask::kCausal);
  EXPECT_EQ(BuildKvRing(made.problem, Pass::kForward).ranks[5].slots.size(), 3u);
  EXPECT_EQ(BuildKvRing(made.problem, Pass::kBackward).ranks[5].slots.size(), 8u);
}

ExchangeProblem ZigzagCausal(int ranks, int64_t rows) {
  return ExchangeCaseMaker(4).Make(ranks, rows, ranks * rows, CaseLayout::kZigzag, CaseMask::kCausal).problem;
}

TEST(Validate, IsQuick) {
  for (const auto& [ranks, seconds] : {std::pair{16, 0.2}, std::pair{64, 1.0}}) {
    const ExchangePlan plan = BuildKvRing(ZigzagCausal(ranks, 2), Pass::kBackward);
    const auto begin = std::chrono::steady_clock::now();
    EXPECT_TRUE(Validate(plan).ok());
    const double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    RecordProperty("ms_" + std::to_string(ranks), static_cast<int>(took * 1000));
    EXPECT_LT(took, 10 * seconds) << ranks << " ranks";  // 10: sanitizers, busy machines
  }
}

// More messages than an MPI tag can number.
TEST(Validate, AcceptsManyRanks) {
  const ExchangePlan plan = BuildKvRing(ZigzagCausal(160, 2), Pass::kBackward, RingDirection::kTowardLower);
  EXPECT_EQ(Validate(plan), absl::OkStatus());
  int messages = 0;
  for (const RankPlan& rank : plan.ranks) {
    for (const Step& step : rank.steps) messages += step.kind == StepKind::kSend ? 1 : 0;
  }
  EXPECT_GT(messages, Communicator::kMaxTag);
}

TEST(Plan, HashTellsPlansApart) {
  const ExchangeProblem problem = ZigzagCausal(3, 4);
  const ExchangePlan plan = BuildKvRing(problem, Pass::kBackward);
  EXPECT_EQ(HashOf(plan), HashOf(BuildKvRing(problem, Pass::kBackward)));
  std::vector<uint64_t> hashes = {HashOf(plan), HashOf(BuildKvRing(problem, Pass::kForward)),
                                  HashOf(BuildKvRing(problem, Pass::kBackward, RingDirection::kTowardHigher)),
                                  HashOf(BuildKvRing(ZigzagCausal(3, 6), Pass::kBackward))};
  const std::vector<std::function<void(ExchangePlan&)>> changes = {
      [](ExchangePlan& p) { p.ranks[1].steps[3].message += 100; },
      [](ExchangePlan& p) { p.ranks[2].steps[0].slot += 1; },
      [](ExchangePlan& p) { p.ranks[0].steps[4].rows.end -= 1; },
      [](ExchangePlan& p) { p.problem.pairs[1] += 1; },
      [](ExchangePlan& p) { p.ranks[0].steps.pop_back(); },
      [](ExchangePlan& p) { p.ranks[0].slots.pop_back(); }};
  for (const auto& change : changes) {
    ExchangePlan changed = plan;
    change(changed);
    hashes.push_back(HashOf(changed));
  }
  std::sort(hashes.begin(), hashes.end());
  EXPECT_EQ(std::unique(hashes.begin(), hashes.end()), hashes.end());
}

TEST(Plan, PrintsAsText) {
  const ExchangePlan plan = BuildKvRing(ZigzagCausal(2, 4), Pass::kForward);
  EXPECT_EQ(ToString(plan),
            "kv_ring toward lower ranks, forward, 2 ranks, blocks of 4 rows\n"
            "rank 0    0  attend block 0 rows [0, 4) in slot 0, 10 pairs\n"
            "rank 0    1  send block 0 rows [0, 2) of slot 0 to rank 1, message 0\n"
            "rank 0    2  receive block 1 rows [0, 4) into slot 1 from rank 1, message 1\n"
            "rank 0    3  attend block 1 rows [0, 4) in slot 1, 8 pairs, after 2\n"
            "rank 1    0  attend block 1 rows [0, 4) in slot 0, 10 pairs\n"
            "rank 1    1  send block 1 rows [0, 4) of slot 0 to rank 0, message 1\n"
            "rank 1    2  receive block 0 rows [0, 2) into slot 1 from rank 0, message 0\n"
            "rank 1    3  attend block 0 rows [0, 2) in slot 1, 8 pairs, after 2\n");
}

// Two ranks, full mask, 10 rows: blocks cross at once while each attends to its own.
TEST(Simulate, AddsUpAsByHand) {
  const ExchangeCase made = ExchangeCaseMaker(5).Make(2, 10, 20, CaseLayout::kContiguous, CaseMask::kFull);
  const ExchangePlan plan = BuildKvRing(made.problem, Pass::kForward);
  ExchangeCost cost{.seconds_per_pair = 0.01,
                    .kv_row_bytes = 5,
                    .grad_row_bytes = 0,
                    .bytes_per_second = 100,
                    .message_seconds = 0.25,
                    .reduce_bytes_per_second = 0};
  // 1 s of compute a block; a transfer takes 0.5 s + 0.25 s and is hidden.
  Simulation run = Simulate(plan, cost);
  EXPECT_DOUBLE_EQ(run.makespan, 2.0);
  for (size_t r = 0; r < 2; ++r) {
    EXPECT_DOUBLE_EQ(run.compute[r], 2.0);
    EXPECT_NEAR(run.exposed[r], 0, 1e-12);
    EXPECT_EQ(run.bytes_sent[r], 50);
  }
  // 10 times slower: 5 s + 0.25 s, of which 1 s is hidden.
  cost.bytes_per_second = 10;
  run = Simulate(plan, cost);
  EXPECT_DOUBLE_EQ(run.makespan, 6.25);
  EXPECT_DOUBLE_EQ(run.exposed[0], 4.25);

  EXPECT_EQ(
      Timeline(plan, run, 25),
      "kv_ring toward lower ranks, forward: 6250.000 ms; a letter is a block, '.' waits to compute, '+' adds "
      "up gradients\n"
      "rank 0   compute  |0000.................1111|  exposed 4250.000 ms\n"
      "         kv in    |111111111111111111111    |\n"
      "rank 1   compute  |1111.................0000|  exposed 4250.000 ms\n"
      "         kv in    |000000000000000000000    |\n");
}

// A rank that has ended waits for nothing: rank 0 of a causal mask without zigzag needs no block but its own.
TEST(Simulate, TimelineIsBlankAfterTheLastComputing) {
  const ExchangeCase made = ExchangeCaseMaker(5).Make(2, 10, 20, CaseLayout::kContiguous, CaseMask::kCausal);
  const ExchangeCost cost{.seconds_per_pair = 0.01,
                          .kv_row_bytes = 10,
                          .grad_row_bytes = 10,
                          .bytes_per_second = 100,
                          .message_seconds = 0,
                          .reduce_bytes_per_second = 0};
  // 0.55 s for the pairs of the own block, 1 s for the other one's; 1 s for a block or its gradient to move.
  const ExchangePlan forward = BuildKvRing(made.problem, Pass::kForward);
  EXPECT_EQ(
      Timeline(forward, Simulate(forward, cost), 20),
      "kv_ring toward lower ranks, forward: 2000.000 ms; a letter is a block, '.' waits to compute, '+' adds "
      "up gradients\n"
      "rank 0   compute  |00000               |  exposed 450.000 ms\n"
      "         kv in    |                    |\n"
      "rank 1   compute  |11111.....0000000000|  exposed 450.000 ms\n"
      "         kv in    |0000000000          |\n");
  // Backward, rank 0 waits for its gradient to come home; rank 1 sends it and computes no more.
  const ExchangePlan backward = BuildKvRing(made.problem, Pass::kBackward);
  EXPECT_EQ(Timeline(backward, Simulate(backward, cost), 30),
            "kv_ring toward lower ranks, backward: 3000.000 ms; a letter is a block, '.' waits to compute, "
            "'+' adds "
            "up gradients\n"
            "rank 0   compute  |00000.........................|  exposed 2450.000 ms\n"
            "         kv in    |                              |\n"
            "         grad in  |                    0000000000|\n"
            "rank 1   compute  |11111.....0000000000          |  exposed 1450.000 ms\n"
            "         kv in    |0000000000                    |\n"
            "         grad in  |                              |\n");
}

// The lanes are shared: a rank that sends two blocks at once needs the time of both.
TEST(Simulate, BoundsHoldForRandomPlans) {
  for (uint64_t seed = 0; seed < 30; ++seed) {
    ExchangeCaseMaker maker(seed + 900);
    const ExchangeCase made = maker.MakeRandom(static_cast<int>(1 + maker.Below(9)));
    const ExchangePlan plan = BuildKvRing(made.problem, kPasses[seed % 2]);
    const ExchangeCost cost{.seconds_per_pair = 1e-3,
                            .kv_row_bytes = 8,
                            .grad_row_bytes = 16,
                            .bytes_per_second = 500,
                            .message_seconds = 0.01,
                            .reduce_bytes_per_second = 1e4};
    const Simulation run = Simulate(plan, cost);
    for (size_t r = 0; r < plan.ranks.size(); ++r) {
      const int64_t sent = BytesSent(plan, static_cast<int>(r), 8, 16);
      EXPECT_EQ(run.bytes_sent[r], sent);
      EXPECT_GE(run.makespan + 1e-9, run.compute[r] + run.exposed[r]);
      EXPECT_GE(run.makespan + 1e-9, static_cast<double>(sent) / cost.bytes_per_second);
      EXPECT_GE(run.exposed[r], -1e-9);
      for (size_t s = 0; s < plan.ranks[r].steps.size(); ++s) {
        for (const int before : plan.ranks[r].steps[s].after) {
          EXPECT_GE(run.steps[r][s].start + 1e-12, run.steps[r][static_cast<size_t>(before)].end);
        }
      }
    }
  }
}

// A balanced ring whose blocks take longer to compute than to move exposes nothing but the last gradient.
TEST(Simulate, ZigzagHidesTransfersBehindCompute) {
  const ExchangePlan forward = BuildKvRing(ZigzagCausal(8, 16), Pass::kForward);
  const ExchangeCost cost{.seconds_per_pair = 1e-3,
                          .kv_row_bytes = 4,
                          .grad_row_bytes = 8,
                          .bytes_per_second = 2000,
                          .message_seconds = 1e-4,
                          .reduce_bytes_per_second = 0};
  const Simulation run = Simulate(forward, cost);
  for (size_t r = 0; r < 8; ++r) EXPECT_LT(run.exposed[r], 0.05 * run.compute[r]) << Timeline(forward, run);
  const ExchangePlan backward = BuildKvRing(ZigzagCausal(8, 16), Pass::kBackward);
  const Simulation back = Simulate(backward, cost);
  const double gradient_home = 16 * 8 / cost.bytes_per_second + cost.message_seconds;
  for (size_t r = 0; r < 8; ++r) {
    EXPECT_LT(back.exposed[r], 0.1 * back.compute[r] + 2 * gradient_home) << Timeline(backward, back);
  }
}

}  // namespace
}  // namespace annulus
