// Latents or keys and values: what expanding takes, and which way is taken and why.

#include "annulus/parallel/choose_latents.h"

#include <gtest/gtest.h>

#include "absl/strings/match.h"

namespace annulus::testing {
namespace {

// DeepSeek-V3's layer on two ranks.
AttentionCase LatentLayer(int64_t length, DType dtype = DType::kBF16) {
  return {.layout = SequenceLayout(LayoutKind::kZigzag, length, 2),
          .sequences = {.batch = 1, .lengths = {length}, .document_starts = {}},
          .heads = 128,
          .kv_heads = 1,
          .head_dim = 192,
          .v_head_dim = 128,
          .device = DeviceKind::kCuda,
          .dtype = dtype,
          .latent = LatentShape{.columns = 512, .nope = 128, .rope = 64, .v = 128}};
}
constexpr int64_t kLength = 16384;
constexpr double kFlops = 2.0 * kLength / 2 * 128 * 256 * 512;  // of one rank's expansion

double Seconds(const MachineProfile& machine, Pass pass, DType dtype = DType::kBF16) {
  return HomeExpansionSeconds(LatentLayer(kLength, dtype), pass, machine);
}

// The expansion; backward the expansion again, and the gradients of latents and of the weight.
TEST(HomeExpansion, TakesWhatTheProfileSaysOfProducts) {
  MachineProfile machine = AssumedHopper();
  machine.products = {{1e9, 400e12}}, machine.product_gradients = {{1e9, 200e12}};
  MachineProfile slow = machine;
  slow.products[0].per_second /= 2, slow.product_gradients[0].per_second /= 2;
  const double forward = Seconds(slow, Pass::kForward) - Seconds(machine, Pass::kForward);
  const double backward = Seconds(slow, Pass::kBackward) - Seconds(machine, Pass::kBackward);
  EXPECT_NEAR(forward, kFlops / 400e12, 1e-9);
  EXPECT_NEAR(backward, kFlops / 400e12 + 2 * kFlops / 200e12, 1e-9);
  // Rates are those of bf16.
  EXPECT_GT(Seconds(machine, Pass::kForward, DType::kF32), kFlops / 67e12);
}

TEST(HomeExpansion, IsAssumedWhereNothingWasMeasured) {
  MachineProfile without = AssumedHopper();
  without.products.clear(), without.product_gradients.clear();
  for (const Pass pass : {Pass::kForward, Pass::kBackward})
    EXPECT_EQ(Seconds(without, pass), Seconds(AssumedHopper(), pass));
}

std::optional<PlanCandidate> Taking(double seconds) {
  PlanCandidate plan;
  plan.seconds = seconds;
  return plan;
}

TEST(DecideLatents, WeighsBothTimesWithWhatIsDoneAtHome) {
  const MachineProfile machine = AssumedHopper();
  const double home = Seconds(machine, Pass::kForward);
  LatentAlternatives ways{.latents = Taking(3e-3), .expanded = Taking(3e-3 - home / 2)};
  const auto decide = [&] { return DecideLatents(LatentLayer(kLength), Pass::kForward, ways, machine); };
  EXPECT_TRUE(decide().latents);
  EXPECT_EQ(*decide().latent_seconds, 3e-3);
  EXPECT_NEAR(*decide().expanded_seconds, 3e-3 + home / 2, 1e-12);
  EXPECT_TRUE(absl::StartsWith(decide().why, "latents 3 ms, 576 elements a token; keys and values "));
  EXPECT_TRUE(absl::EndsWith(decide().why, " ms, 40960 elements a token")) << decide().why;
  ways.expanded = Taking(3e-3 - 2 * home);
  EXPECT_FALSE(decide().latents);
  EXPECT_EQ(Name(decide()), "keys and values");
  ways.asked = LatentExchange::kLatent;
  EXPECT_TRUE(decide().latents);
  EXPECT_TRUE(absl::StrContains(decide().why, ", as parallel.exchange.latent says; ")) << decide().why;
}

TEST(DecideLatents, TakesWhatCanBe) {
  LatentAlternatives ways{.latents = Invalid("no memory"), .expanded = Taking(1)};
  const auto decide = [&] {
    return DecideLatents(LatentLayer(kLength), Pass::kBackward, ways, AssumedHopper());
  };
  EXPECT_FALSE(decide().latents);
  EXPECT_TRUE(absl::EndsWith(decide().why, "; latents cannot be (no memory)")) << decide().why;
  ways = {.latents = Taking(1), .expanded = Invalid("no memory")};
  EXPECT_TRUE(decide().latents);
  // Times that nobody predicts.
  ways = {};
  EXPECT_TRUE(decide().latents);
}

bool LatentsAreFaster(int64_t length, LinkThrottle throttle) {
  const AttentionCase layer = LatentLayer(length);
  const PlanOptions options{.plans = {{.kind = PlanKind::kKvRing}},
                            .transports = {TransportKind::kCopyEngine},
                            .throttle = throttle};
  const auto fastest = [&](const AttentionCase& way) {
    return std::optional(RankPlans(way, Pass::kForward, options, AssumedHopper()).front());
  };
  return DecideLatents(layer, Pass::kForward,
                       {.latents = fastest(layer), .expanded = fastest(Expanded(layer))}, AssumedHopper())
      .latents;
}

// Bytes grow with the length, the attention that hides them with its square: links that are fast enough for
// long sequences are too slow for short ones.
TEST(DecideLatents, FollowsTheLength) {
  const LinkThrottle slow{.bytes_per_second = 20e9};
  EXPECT_TRUE(LatentsAreFaster(2 * 8192, slow));
  EXPECT_FALSE(LatentsAreFaster(2 * (int64_t{1} << 20), slow));
}

}  // namespace
}  // namespace annulus::testing
