// Goodput against what is expected of exponential failures, over thousands of them.

#include "annulus/study/goodput.h"

#include <gtest/gtest.h>

#include <cmath>

namespace annulus {
namespace {

// A job that fails every 5 hours, saves in 60 seconds and restarts in 300.
GoodputInputs Job() {
  return {.step_seconds = 10,
          .hosts = 100,
          .checkpoint_bytes = 6000,
          .steps = 10'000'000,
          .reliability = {.failure_hours = 500, .restart_seconds = 300, .storage_bytes_per_second = 1},
          .seed = 3};
}
constexpr double kBetweenFailures = 5 * 3600, kSave = 60, kRestart = 300;

// Mean time from one save to the next, of steps that take so long: exact for exponential failures (Daly,
// 2006).
double Expected(double computing) {
  return kBetweenFailures * std::exp(kRestart / kBetweenFailures) *
         std::expm1((computing + kSave) / kBetweenFailures);
}

TEST(Goodput, IsAsExpectedOfExponentialFailures) {
  for (const int64_t steps : {20, 147, 1000}) {
    GoodputInputs inputs = Job();
    inputs.steps_between_saves = steps;
    const Goodput goodput = SimulateGoodput(inputs);
    const double computing = 10.0 * static_cast<double>(steps);
    EXPECT_GT(goodput.failures, 5000);
    EXPECT_NEAR(goodput.share / (computing / Expected(computing)), 1, 0.01) << steps;
    EXPECT_NEAR(goodput.saving_seconds, 60 * 1e7 / static_cast<double>(steps), 61);
    EXPECT_NEAR(goodput.seconds,
                1e8 + goodput.saving_seconds + goodput.lost_seconds + goodput.restarting_seconds, 1e-2);
    EXPECT_NEAR(goodput.restarting_seconds / static_cast<double>(goodput.failures), 300, 10);
  }
}

TEST(Goodput, YoungsIntervalIsTheBest) {
  const GoodputInputs inputs = Job();
  const int64_t best = BestStepsBetweenSaves(inputs);
  EXPECT_EQ(best, std::llround(std::sqrt(2 * kSave * kBetweenFailures) / 10));
  const Goodput goodput = SimulateGoodput(inputs);
  EXPECT_EQ(goodput.steps_between_saves, best);
  // First order: saves, half an interval for each failure, restarts.
  const double interval = 10.0 * static_cast<double>(best);
  const double waste = kSave / interval + (interval / 2 + kRestart) / kBetweenFailures;
  EXPECT_NEAR(goodput.share, 1 - waste, 0.02);
  for (const int64_t other : {best / 3, best * 3}) {
    GoodputInputs changed = inputs;
    changed.steps_between_saves = other;
    EXPECT_LT(SimulateGoodput(changed).share, goodput.share);
  }
}

TEST(Goodput, WithoutFailuresOrSavesNothingIsLost) {
  GoodputInputs inputs = Job();
  inputs.steps = 1000;
  inputs.reliability = {};
  const Goodput free = SimulateGoodput(inputs);
  EXPECT_EQ(free.share, 1);
  EXPECT_EQ(free.seconds, 10'000);
  EXPECT_EQ(free.failures, 0);
  EXPECT_EQ(free.steps_between_saves, 1000) << "one at the end";
  inputs.reliability.storage_bytes_per_second = 1;
  inputs.steps_between_saves = 300;
  EXPECT_EQ(SimulateGoodput(inputs).seconds, 10'000 + 4 * 60);
}

TEST(Goodput, IsItsSeeds) {
  GoodputInputs inputs = Job();
  inputs.steps = 100'000;
  const double seconds = SimulateGoodput(inputs).seconds;
  EXPECT_EQ(SimulateGoodput(inputs).seconds, seconds);
  inputs.seed = 4;
  EXPECT_NE(SimulateGoodput(inputs).seconds, seconds);
}

// A failure a second: it ends all the same.
TEST(Goodput, GivesUpWhatDoesNotGetAhead) {
  GoodputInputs inputs = Job();
  inputs.steps = 100;
  inputs.reliability.failure_hours = 100 / 3600.0;
  const Goodput goodput = SimulateGoodput(inputs);
  EXPECT_EQ(goodput.share, 0);
  EXPECT_GT(goodput.failures, 1000);
}

}  // namespace
}  // namespace annulus
