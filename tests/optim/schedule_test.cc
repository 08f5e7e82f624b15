#include <gtest/gtest.h>

#include "annulus/train/optimizer.h"

namespace annulus {
namespace {

OptimSpec SpecOf(ScheduleKind kind, int64_t warmup_steps, int64_t decay_steps) {
  OptimSpec spec;
  spec.lr = 2.0;
  spec.steps = 100;
  spec.schedule = {
      .kind = kind, .warmup_steps = warmup_steps, .decay_steps = decay_steps, .final_ratio = 0.1};
  return spec;
}

TEST(LearningRate, WarmupRisesLinearlyToThePeak) {
  for (const ScheduleKind kind :
       {ScheduleKind::kConstant, ScheduleKind::kCosine, ScheduleKind::kWarmupStableDecay}) {
    const OptimSpec spec = SpecOf(kind, 20, 10);
    EXPECT_DOUBLE_EQ(LearningRate(spec, 0), 2.0 / 20);  // not zero: no step is wasted
    EXPECT_DOUBLE_EQ(LearningRate(spec, 9), 1.0);
    EXPECT_DOUBLE_EQ(LearningRate(spec, 19), 2.0);
    EXPECT_DOUBLE_EQ(LearningRate(spec, 20), 2.0);
  }
}

TEST(LearningRate, ConstantStays) {
  const OptimSpec spec = SpecOf(ScheduleKind::kConstant, 0, 0);
  for (const int64_t step : {0, 50, 99, 100, 1000}) EXPECT_DOUBLE_EQ(LearningRate(spec, step), 2.0);
}

// cos falls from 1 at the end of the warm-up through 0 half-way to -1 after the last step.
TEST(LearningRate, CosineFallsToTheFinalRatio) {
  const OptimSpec spec = SpecOf(ScheduleKind::kCosine, 20, 0);
  EXPECT_DOUBLE_EQ(LearningRate(spec, 40), 2.0 * (0.1 + 0.9 * 0.5 * (1 + std::sqrt(0.5))));
  EXPECT_DOUBLE_EQ(LearningRate(spec, 60), 2.0 * (0.1 + 0.9 * 0.5));
  EXPECT_DOUBLE_EQ(LearningRate(spec, 80), 2.0 * (0.1 + 0.9 * 0.5 * (1 - std::sqrt(0.5))));
  EXPECT_DOUBLE_EQ(LearningRate(spec, 100), 0.2);
  EXPECT_DOUBLE_EQ(LearningRate(spec, 500), 0.2);
  for (int64_t step = 20; step < 100; ++step)
    EXPECT_GT(LearningRate(spec, step), LearningRate(spec, step + 1));
}

TEST(LearningRate, StablePhaseEndsInALinearDecay) {
  const OptimSpec spec = SpecOf(ScheduleKind::kWarmupStableDecay, 20, 40);
  for (const int64_t step : {20, 40, 59, 60}) EXPECT_DOUBLE_EQ(LearningRate(spec, step), 2.0);
  EXPECT_DOUBLE_EQ(LearningRate(spec, 70), 2.0 * (1 - 0.9 * 0.25));
  EXPECT_DOUBLE_EQ(LearningRate(spec, 80), 2.0 * (1 - 0.9 * 0.5));
  EXPECT_DOUBLE_EQ(LearningRate(spec, 100), 0.2);
  EXPECT_DOUBLE_EQ(LearningRate(spec, 500), 0.2);
}

TEST(LearningRate, AWarmupLongerThanTheRunIsCutOff) {
  OptimSpec spec = SpecOf(ScheduleKind::kCosine, 400, 0);
  EXPECT_DOUBLE_EQ(LearningRate(spec, 99), 2.0 * 100 / 400);
}

}  // namespace
}  // namespace annulus
