#include "annulus/parallel/machine_profile.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

namespace annulus {
namespace {

TEST(RateAt, IsLinearInTheLogarithmOfTheSize) {
  const std::vector<RatePoint> points = {{1e3, 10}, {1e5, 30}, {1e6, 60}};
  EXPECT_DOUBLE_EQ(RateAt(points, 1e3), 10);
  EXPECT_DOUBLE_EQ(RateAt(points, 1e4), 20);
  EXPECT_DOUBLE_EQ(RateAt(points, 1e5), 30);
  EXPECT_NEAR(RateAt(points, 1e5 * std::sqrt(10.0)), 45, 1e-9);
  EXPECT_DOUBLE_EQ(RateAt(points, 1e6), 60);
  // Outside: the nearest.
  EXPECT_DOUBLE_EQ(RateAt(points, 1), 10);
  EXPECT_DOUBLE_EQ(RateAt(points, 1e9), 60);
  EXPECT_DOUBLE_EQ(RateAt({{5, 7}}, 3), 7);
}

const AttentionRate& Find(const MachineProfile& machine, AttentionKernel kernel, Pass pass, MaskShape shape,
                          int64_t head_dim, Determinism determinism) {
  const auto found =
      std::find_if(machine.attention.begin(), machine.attention.end(), [&](const AttentionRate& rate) {
        return rate.kernel == kernel && rate.pass == pass && rate.shape == shape &&
               rate.head_dim == head_dim && rate.determinism == determinism;
      });
  EXPECT_NE(found, machine.attention.end());
  return *found;
}

// 16 heads of 128, 32K causal: 2^29 pairs of a head (and a few), 512 FLOPs each forward, 1280 backward.
TEST(AssumedHopper, HasTheRatesThatWereMeasured) {
  const MachineProfile machine = AssumedHopper();
  const double pairs = 16.0 * (1 << 29);
  const auto tflops = [&](AttentionKernel kernel, Pass pass, MaskShape shape, double flops,
                          Determinism determinism = Determinism::kOff) {
    return RateAt(Find(machine, kernel, pass, shape, 128, determinism).pairs, pairs) * flops / 1e12;
  };
  EXPECT_NEAR(tflops(AttentionKernel::kCudnn, Pass::kForward, MaskShape::kCausal, 512), 620, 15);
  EXPECT_NEAR(tflops(AttentionKernel::kCudnn, Pass::kBackward, MaskShape::kCausal, 1280), 535, 10);
  EXPECT_NEAR(tflops(AttentionKernel::kTensorCore, Pass::kForward, MaskShape::kGeneral, 512), 409, 10);
  EXPECT_NEAR(tflops(AttentionKernel::kTensorCore, Pass::kBackward, MaskShape::kGeneral, 1280), 320, 10);
  constexpr Determinism kRequired = Determinism::kRequired;
  EXPECT_NEAR(tflops(AttentionKernel::kTensorCore, Pass::kBackward, MaskShape::kGeneral, 1280, kRequired),
              265, 10);
  EXPECT_NEAR(tflops(AttentionKernel::kHopper, Pass::kForward, MaskShape::kCausal, 512), 710, 15);
  EXPECT_NEAR(tflops(AttentionKernel::kHopper, Pass::kBackward, MaskShape::kCausal, 1280), 540, 10);
  EXPECT_NEAR(tflops(AttentionKernel::kHopper, Pass::kBackward, MaskShape::kGeneral, 1280, kRequired), 472,
              10);
}

TEST(RunsHopperKernels, IsByTheGpuElseByTheRates) {
  MachineProfile machine = AssumedHopper();
  EXPECT_TRUE(RunsHopperKernels(machine));
  machine.compute_capability = 0;
  EXPECT_TRUE(RunsHopperKernels(machine)) << "it has rates of them";
  machine.compute_capability = 80;
  EXPECT_FALSE(RunsHopperKernels(machine));
  EXPECT_FALSE(RunsHopperKernels(AssumedCpuCore()));
}

// Whatever is looked up is there, and points ascend.
TEST(AssumedProfiles, AreComplete) {
  for (const MachineProfile& machine : {AssumedHopper(), AssumedCpuCore()}) {
    EXPECT_FALSE(machine.measured) << machine.device;
    const auto check = [&](const std::vector<RatePoint>& points) {
      ASSERT_FALSE(points.empty());
      for (size_t i = 0; i < points.size(); ++i) {
        EXPECT_GT(points[i].per_second, 0);
        if (i == 0) continue;
        EXPECT_GT(points[i].size, points[i - 1].size);
        EXPECT_GE(points[i].per_second, points[i - 1].per_second);  // a larger one is no slower
      }
    };
    check(machine.copy);
    for (const LinkRate& link : machine.links) {
      check(link.one_way);
      check(link.both_ways);
      EXPECT_GE(link.computing_slowdown, 1);
    }
    for (const AttentionRate& rate : machine.attention) check(rate.pairs);
    for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
      EXPECT_TRUE(std::any_of(machine.attention.begin(), machine.attention.end(),
                              [&](const AttentionRate& rate) { return rate.pass == pass; }));
    }
  }
}

}  // namespace
}  // namespace annulus
