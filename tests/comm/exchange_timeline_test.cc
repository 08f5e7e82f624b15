// Recording of executions, and what overlaps in a timeline. Executions of whole plans are measured in
// exchange_timeline_mpi_test.cc, exchange_stream_test.cc and, on GPUs, tests/gpu.

#include "annulus/comm/exchange_timeline.h"

#include <gtest/gtest.h>

#include "support/loopback.h"

namespace annulus {
namespace {

// Steps of a rank with their times.
struct Timed {
  Step step;
  StepTiming timing;
};
Timed Computes(double start, double end) { return {{.kind = StepKind::kAttend}, {start, end}}; }
Timed Sends(int peer, int message, double start, double end) {
  return {{.kind = StepKind::kSend, .slot = 0, .peer = peer, .message = message}, {start, end}};
}
Timed Receives(int peer, int message, double start, double end) {
  return {{.kind = StepKind::kReceive, .slot = 0, .peer = peer, .message = message}, {start, end}};
}

TimelineOverlap Overlap(const std::vector<std::vector<Timed>>& ranks) {
  ExchangePlan plan;
  Simulation run;
  for (const std::vector<Timed>& rank : ranks) {
    plan.ranks.emplace_back();
    run.steps.emplace_back();
    for (const Timed& timed : rank) {
      plan.ranks.back().steps.push_back(timed.step);
      run.steps.back().push_back(timed.timing);
    }
  }
  return OverlapOf(plan, run);
}

//     0 -> 1   [0 4] [6 10]            rank 0 computes [1 3] [2 5] [9 12]
//     1 -> 0      [3     8]            rank 1 computes nothing
//     0 -> 2   [0              20]
TEST(TimelineOverlap, OfTwoRanksBothWays) {
  const TimelineOverlap overlap =
      Overlap({{Computes(1, 3), Computes(2, 5), Sends(1, 0, 0, 4), Sends(1, 1, 6, 10), Receives(1, 2, 3, 8),
                Sends(2, 3, 0, 20), Computes(9, 12)},
               {Receives(0, 0, 0, 4), Receives(0, 1, 6, 10), Sends(0, 2, 3, 8)},
               {Receives(0, 3, 0, 20)}});
  EXPECT_DOUBLE_EQ(overlap.both_ways, (4 - 3) + (8 - 6));
  EXPECT_DOUBLE_EQ(overlap.shorter_way, 8 - 3);
  EXPECT_DOUBLE_EQ(overlap.transfers, 20 + 10 + 20);
  EXPECT_DOUBLE_EQ(overlap.under_compute, (5 - 1) + (12 - 9));
  EXPECT_EQ(
      OverlapText(overlap),
      "both directions between ranks at once for 3000.000 of 5000.000 ms (60%); 7000.000 of 50000.000 ms "
      "(14%) of transfers under computing");
}

TEST(TimelineOverlap, OfOneDirectionIsNone) {
  const TimelineOverlap overlap = Overlap({{Sends(1, 0, 0, 1)}, {Receives(0, 0, 0, 1)}, {Computes(0, 1)}});
  EXPECT_EQ(overlap.both_ways, 0);
  EXPECT_EQ(overlap.shorter_way, 0);
  EXPECT_DOUBLE_EQ(overlap.transfers, 2);
  EXPECT_EQ(overlap.under_compute, 0);
  EXPECT_NE(OverlapText(overlap).find("between no two ranks both directions"), std::string::npos);
}

ExchangePlan PlanOfSteps(std::vector<size_t> steps) {
  ExchangePlan plan{.name = "by hand", .problem = {}};
  for (const size_t count : steps) {
    plan.ranks.emplace_back();
    plan.ranks.back().steps.assign(count, {.kind = StepKind::kAttend});
  }
  return plan;
}

// What a rank did not record is an error on every rank, which says where.
TEST(StepClock, RefusesWhatWasNotRecorded) {
  testing::OnLoopback(2, [](Communicator comm) {
    Context ctx{Device{}};
    StepClock clock(ctx.device);
    const auto take = [&](const ExchangePlan& plan) {
      return std::string(clock.Take(plan, comm).status().message());
    };
    const auto run = [&](size_t steps, size_t recorded) {
      clock.BeginRun(steps, nullptr);
      for (size_t s = 0; s < recorded; ++s) {
        clock.Begin(s, nullptr);
        clock.End(s, nullptr);
      }
      clock.EndRun(0, nullptr);
    };
    ASSERT_TRUE(clock.Start(ctx, comm).ok());
    EXPECT_NE(take(PlanOfSteps({1, 1})).find("recorded 0 steps, expected an execution of 1"),
              std::string::npos);
    run(2, comm.rank() == 0 ? 2 : 1);
    EXPECT_NE(take(PlanOfSteps({2, 2})).find("rank 1 step 1 "), std::string::npos)
        << take(PlanOfSteps({2, 2}));
    EXPECT_NE(take(PlanOfSteps({2, 3})).find("rank 1 recorded 2 steps, expected an execution of 3"),
              std::string::npos);
    run(2, 2);
    EXPECT_EQ(take(PlanOfSteps({2, 2})), "");
    // Not those of an execution before Start.
    ASSERT_TRUE(clock.Start(ctx, comm).ok());
    EXPECT_NE(take(PlanOfSteps({2, 2})).find("recorded 0 steps"), std::string::npos);
  });
}

TEST(StepClockDeathTest, RecordsAStepOnce) {
  StepClock clock{Device{}};
  clock.BeginRun(1, nullptr);
  clock.Begin(0, nullptr);
  EXPECT_DEATH(clock.Begin(0, nullptr), "recorded twice");
}

}  // namespace
}  // namespace annulus
