// A calibration on ranks that are threads: every rate that the cost model asks for, the same on every rank.

#include "annulus/train/calibrate.h"

#include <cmath>
#include <mutex>

#include "../../src/trainer/calibrate_kernels.h"
#include "absl/strings/match.h"
#include "annulus/train/profile.h"
#include "trainer/trainer_testing.h"

namespace annulus::testing {
namespace {

// The profile of each rank.
std::vector<MachineProfile> CalibrateOn(int ranks, const CalibrationOptions& options) {
  std::vector<MachineProfile> profiles(static_cast<size_t>(ranks));
  OnLoopback(ranks, [&](Communicator world) {
    Machine machine;
    machine.ctx = std::make_unique<Context>(Device{});
    machine.mesh = ProcessMesh::Create({1, ranks, 1}, world).value();
    const absl::StatusOr<MachineProfile> profile = Calibrate(machine, options);
    ANNULUS_CHECK(profile.ok()) << profile.status();
    profiles[static_cast<size_t>(world.rank())] = *profile;
  });
  return profiles;
}

const CalibrationHeads kHeads{
    .dtype = DType::kF32, .heads = 2, .kv_heads = 1, .head_dim = 8, .v_head_dim = 4};

TEST(Calibrate, MeasuresWhatTheCostModelAsksFor) {
  const std::vector<MachineProfile> profiles = CalibrateOn(2, {.heads = {kHeads}, .seconds = 1e-3});
  EXPECT_TRUE(profiles[0] == profiles[1]) << "ranks that predict differently would choose differently";
  const MachineProfile& profile = profiles[0];
  EXPECT_TRUE(profile.measured);
  EXPECT_EQ(profile.ranks, 2);
  EXPECT_GT(profile.launch_seconds, 0);
  ASSERT_EQ(profile.links.size(), 1u);
  EXPECT_EQ(profile.links[0].transport, TransportKind::kHost);
  EXPECT_GT(profile.links[0].message_seconds, 0);
  EXPECT_GE(profile.links[0].computing_slowdown, 1);
  ASSERT_FALSE(profile.products.empty());
  ASSERT_EQ(profile.product_gradients.size(), profile.products.size());
  // Of 32 tokens and weights of 512 x 64, or as many elements in other shapes; and of both gradients.
  EXPECT_EQ(profile.products[0].size, 2.0 * 32 * 512 * 64);
  EXPECT_EQ(profile.product_gradients[0].size, 2 * profile.products[0].size);
  for (const RatePoint& point : profile.products) EXPECT_GT(point.per_second, 1e6);
  ASSERT_EQ(profile.scans.size(), 4u) << "two passes of two kernels";
  for (const ScanRate& rate : profile.scans) {
    ASSERT_EQ(rate.updates.size(), 1u);
    for (const RatePoint& point : rate.updates) EXPECT_GT(point.per_second, 1e5);
  }
  EXPECT_EQ(profile.scans[0].updates[0].size, 64 * 8 * 16 * 16) << "tokens, heads, state, head dim";
  for (const PassKind kind : {PassKind::kNorm, PassKind::kActivation, PassKind::kRope, PassKind::kConvolution,
                              PassKind::kGatedNorm, PassKind::kCrossEntropy, PassKind::kAdamW}) {
    EXPECT_TRUE(std::any_of(profile.passes.begin(), profile.passes.end(), [&](const PassRate& rate) {
      return rate.kind == kind && rate.pass == Pass::kForward && rate.bytes.size() == 1;
    })) << static_cast<int>(kind);
  }
  ASSERT_FALSE(profile.collectives.empty());
  EXPECT_EQ(profile.collectives[0].size, 8192) << "of two ranks each sends half of 16 KiB";
  EXPECT_GT(profile.memory_bytes, 0);
  EXPECT_GT(profile.other_memory_bytes, 0);
  EXPECT_LT(profile.other_memory_bytes, profile.memory_bytes);
  ASSERT_EQ(profile.attention.size(), 6u) << "two passes of three shapes";
  for (const AttentionRate& rate : profile.attention) {
    EXPECT_EQ(rate.kernel, AttentionKernel::kCpuTiles);
    EXPECT_EQ(rate.head_dim, 8);
    EXPECT_EQ(rate.v_head_dim, 4);
    EXPECT_EQ(rate.pairs.size(), 1u) << "time was over after the first size";
  }
  // Checks order, ranges and completeness.
  const auto again = ParseProfile("p", ProfileText(profile));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(*again == profile);
}

TEST(Calibrate, CountsUnmaskedPairsOfAllHeads) {
  const MachineProfile profile = CalibrateOn(1, {.heads = {kHeads}, .seconds = 1e-3})[0];
  for (const AttentionRate& rate : profile.attention) {
    constexpr double kRows = 256;  // of the first size on CPUs
    const double pairs = rate.shape == MaskShape::kFull     ? kRows * kRows
                         : rate.shape == MaskShape::kCausal ? kRows * (kRows + 1) / 2
                                                            : 64 * 65 / 2 + 192 * 64;  // a window of 64
    EXPECT_EQ(rate.pairs[0].size, 2 * pairs);
  }
}

TEST(Calibrate, APlanIsPredictedByIt) {
  const MachineProfile profile = CalibrateOn(2, {.heads = {kHeads}, .seconds = 1e-3})[0];
  const AttentionCase layer{.layout = SequenceLayout(LayoutKind::kZigzag, 100, 2),
                            .sequences = {.batch = 1, .lengths = {100}, .document_starts = {}},
                            .heads = 2,
                            .kv_heads = 1,
                            .head_dim = 8,
                            .v_head_dim = 4};
  for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
    const auto ranked =
        RankPlans(layer, pass, {.plans = {}, .transports = {TransportKind::kHost}, .throttle = {}}, profile);
    for (const PlanCandidate& candidate : ranked) {
      EXPECT_TRUE(candidate.refused.ok()) << candidate.refused;
      EXPECT_GT(candidate.seconds, 0) << candidate.name;
    }
  }
}

TEST(Calibrate, OneRankHasNoLinks) {
  const MachineProfile profile = CalibrateOn(1, {.heads = {kHeads}, .seconds = 1e-3})[0];
  EXPECT_TRUE(profile.links.empty());
  EXPECT_TRUE(profile.collectives.empty());
  const std::string table = ProfileTable(profile);
  for (const char* part : {"measured, 1 rank\n", "launch", "copy", "products", "gradients", "cpu tiles 8/4",
                           "causal backward"}) {
    EXPECT_TRUE(absl::StrContains(table, part)) << part << " in\n" << table;
  }
}

// What Calibrate says on each of the ranks, whose hosts have these names.
std::vector<absl::StatusOr<MachineProfile>> CalibrateOnHosts(const std::vector<std::string>& hosts) {
  std::vector<absl::StatusOr<MachineProfile>> profiles(hosts.size(), absl::UnknownError("not run"));
  const int ranks = static_cast<int>(hosts.size());
  OnLoopback(ranks, [&](Communicator world) {
    Machine machine;
    machine.ctx = std::make_unique<Context>(Device{});
    machine.mesh = ProcessMesh::Create({1, ranks, 1}, world).value();
    const auto rank = static_cast<size_t>(world.rank());
    profiles[rank] = Calibrate(machine, {.heads = {kHeads}, .host = hosts[rank], .seconds = 1e-3});
  });
  return profiles;
}

TEST(Calibrate, TellsLinksInsideHostsFromThoseBetween) {
  const auto profiles = CalibrateOnHosts({"a", "a", "b", "b"});
  for (const auto& profile : profiles) {
    ASSERT_TRUE(profile.ok()) << profile.status();
    EXPECT_TRUE(*profile == *profiles[0]);
  }
  const MachineProfile& profile = *profiles[0];
  EXPECT_EQ(profile.ranks, 2);
  EXPECT_EQ(profile.network.ranks_per_host, 2);
  for (const auto& [links, collectives, slowdown] :
       {std::tuple{profile.links, profile.collectives, profile.collective_slowdown},
        std::tuple{profile.network.links, profile.network.collectives,
                   profile.network.collective_slowdown}}) {
    ASSERT_EQ(links.size(), 1u);
    EXPECT_EQ(links[0].transport, TransportKind::kHost);
    ASSERT_FALSE(collectives.empty());
    EXPECT_EQ(collectives[0].size, 8192) << "of two ranks each sends half of 16 KiB";
    EXPECT_GE(slowdown, 1);
  }
  EXPECT_GE(profile.network.host_bytes_per_second, profile.network.links[0].one_way.back().per_second);
  const std::string table = ProfileTable(profile);
  EXPECT_TRUE(absl::StrContains(table, "between hosts of 2 ranks, together ")) << table;
}

TEST(Calibrate, RanksThatAreAloneOnTheirHostsHaveLinksBetweenHostsOnly) {
  const auto profile = CalibrateOnHosts({"a", "b"})[0];
  ASSERT_TRUE(profile.ok()) << profile.status();
  EXPECT_EQ(profile->ranks, 1);
  EXPECT_EQ(profile->network.ranks_per_host, 1);
  EXPECT_TRUE(profile->links.empty());
  EXPECT_TRUE(profile->collectives.empty());
  EXPECT_EQ(profile->network.links.size(), 1u);
  EXPECT_EQ(profile->network.host_bytes_per_second, 0) << "a rank has its own";
}

TEST(Calibrate, HostsOfDifferentSizesAreRefused) {
  const auto said = [](const std::vector<std::string>& hosts) {
    const absl::Status status = CalibrateOnHosts(hosts)[0].status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_EQ(said({"a", "a", "b"}), "host b: expected 2 ranks on each host, as a has");
  EXPECT_EQ(said({"a", "b", "b"}), "rank 2 on b: expected 1 consecutive rank on each host, as a has");
  EXPECT_EQ(said({"a", "b", "a", "b"}), "rank 1 on b: expected 2 consecutive ranks on each host, as a has");
}

TEST(Rounded, KeepsFourDigits) {
  EXPECT_EQ(Rounded(0), 0);
  EXPECT_EQ(Rounded(123456), 123500);
  EXPECT_EQ(Rounded(1.23456), 1.235);
  EXPECT_EQ(Rounded(1.23456e-6), 1.235e-6);
  EXPECT_EQ(Rounded(9.99999e11), 1e12);
}

}  // namespace
}  // namespace annulus::testing
