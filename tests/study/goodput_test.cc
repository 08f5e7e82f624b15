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
          .seed = 3,
          .histories = 1};  // a long one
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
    EXPECT_NEAR(ExpectedShare(inputs, steps), computing / Expected(computing), 1e-12) << steps;
    EXPECT_NEAR(goodput.saving_seconds, 60 * 1e7 / static_cast<double>(steps), 61);
    EXPECT_NEAR(goodput.seconds,
                1e8 + goodput.saving_seconds + goodput.lost_seconds + goodput.restarting_seconds, 1e-2);
    EXPECT_NEAR(goodput.restarting_seconds / static_cast<double>(goodput.failures), 300, 10);
  }
}

// Daly's higher-order estimate of where the expected share is most, eq. 37.
TEST(Goodput, TheBestIntervalIsDalys) {
  const GoodputInputs inputs = Job();
  const int64_t best = BestStepsBetweenSaves(inputs);
  const double root = std::sqrt(kSave / (2 * kBetweenFailures));
  const double daly = std::sqrt(2 * kSave * kBetweenFailures) * (1 + root / 3 + root * root / 9) - kSave;
  EXPECT_NEAR(static_cast<double>(best), daly / 10, 1);
  for (const int64_t other : {best - 1, best + 1})
    EXPECT_LE(ExpectedShare(inputs, other), ExpectedShare(inputs, best));
  const Goodput goodput = SimulateGoodput(inputs);
  EXPECT_EQ(goodput.best_steps_between_saves, best);
  EXPECT_EQ(goodput.best_share, ExpectedShare(inputs, best));
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

// Means over many short histories are what is expected; one of them is off by about the deviation.
TEST(Goodput, IsTheMeanOfItsHistories) {
  GoodputInputs inputs = Job();
  inputs.steps = 14'000;  // 39 hours, 8 failures
  inputs.steps_between_saves = 140;
  inputs.histories = 1000;
  const Goodput many = SimulateGoodput(inputs);
  const double expected = ExpectedShare(inputs, 140);
  EXPECT_GT(many.share_deviation, 0.005);
  EXPECT_NEAR(many.share, expected, 4 * many.share_deviation / std::sqrt(1000.0) + 1e-3);
  inputs.histories = 1;
  double off = 0;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    inputs.seed = 1000 + seed;
    off = std::max(off, std::abs(SimulateGoodput(inputs).share - expected));
    EXPECT_EQ(SimulateGoodput(inputs).share_deviation, 0);
  }
  EXPECT_GT(off, many.share_deviation);
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
