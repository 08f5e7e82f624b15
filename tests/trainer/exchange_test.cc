// What parallel.exchange of a configuration lets attention layers choose from.

#include "annulus/train/exchange.h"

#include <algorithm>
#include <fstream>
#include <set>

#include "absl/strings/match.h"
#include "annulus/train/profile.h"
#include "trainer/trainer_testing.h"

namespace annulus::testing {
namespace {

std::vector<std::string> Names(const PassPlanSpec& spec, int ranks, int64_t heads = 8) {
  std::vector<std::string> names;
  for (const PlanChoice& choice : ChoicesOf(spec, ranks, heads)) names.push_back(NameOf(choice, ranks));
  return names;
}
using Strings = std::vector<std::string>;

TEST(ChoicesOf, ANamedPlanIsThatPlanWithHeadsWhole) {
  EXPECT_EQ(Names({.plan = PlanName::kKvRing}, 4), Strings{"kv_ring"});
  EXPECT_EQ(Names({.plan = PlanName::kAllGather}, 4), Strings{"all_gather"});
  EXPECT_EQ(Names({.plan = PlanName::kArena, .parts = 2}, 4), Strings{"arena, 2 parts"});
  EXPECT_EQ(Names({.plan = PlanName::kBidirectionalKvRing}, 4), Strings{"bidirectional_kv_ring"});
  EXPECT_EQ(Names({.plan = PlanName::kDirectCast}, 4), Strings{"direct_cast"});
  EXPECT_EQ(Names({.plan = PlanName::kTokenRing}, 4), Strings{"token_ring"});
  EXPECT_EQ(Names({.plan = PlanName::kBidirectionalTokenRing}, 4), Strings{"bidirectional_token_ring"});
  EXPECT_EQ(Names({.plan = PlanName::kBalanced}, 4), Strings{"balanced"});
  EXPECT_EQ(Names({.plan = PlanName::kUlysses}, 4), Strings{"ulysses"});
}

TEST(ChoicesOf, AnOpenInnerSizeIsEveryDivisor) {
  EXPECT_EQ(Names({.plan = PlanName::kMesh}, 12),
            (Strings{"mesh of 6 x 2", "mesh of 4 x 3", "mesh of 3 x 4", "mesh of 2 x 6"}));
  EXPECT_EQ(Names({.plan = PlanName::kDoubleRing, .inner = 4}, 12), Strings{"double_ring of 3 x 4"});
  EXPECT_EQ(Names({.plan = PlanName::kDoubleRing, .head_split = 3}, 12),
            Strings{"double_ring of 2 x 2, heads over 3 ranks"});
  EXPECT_EQ(Names({.plan = PlanName::kMesh}, 5), Strings{"mesh of 1 x 5"}) << "a prime has no divisor";
}

TEST(ChoicesOf, FieldsHoldForEveryChoice) {
  const PassPlanSpec spec{.plan = PlanName::kTokenRing,
                          .direction = RingDirection::kTowardHigher,
                          .head_split = 2,
                          .parts = 3,
                          .buffers = 4,
                          .output_width = Width::kCompute};
  EXPECT_EQ(Names(spec, 4), Strings{"token_ring toward higher ranks, 3 parts, 4 buffers, rounded outputs, "
                                    "heads over 2 ranks"});
  const std::vector<PlanChoice> all = ChoicesOf({.head_split = 2, .inner = 3, .buffers = 3}, 12, 8);
  EXPECT_GT(all.size(), 5u);
  for (const PlanChoice& choice : all) {
    EXPECT_EQ(choice.head_split, 2);
    EXPECT_EQ(choice.buffers, 3);
    const bool reads_inner = choice.kind == PlanKind::kMesh || choice.kind == PlanKind::kDoubleRing;
    EXPECT_TRUE(!reads_inner || choice.inner == 3) << NameOf(choice, 12);
  }
}

TEST(ChoicesOf, AutoIsAllThatCanBeEachOnce) {
  for (const int ranks : {2, 3, 4, 6}) {
    const Strings names = Names({}, ranks);
    EXPECT_EQ(std::set<std::string>(names.begin(), names.end()).size(), names.size()) << ranks;
    EXPECT_EQ(names.size(), AllChoices(ranks, 8).size());
    for (const char* name : {"kv_ring", "token_ring", "ulysses"}) {
      EXPECT_EQ(std::count(names.begin(), names.end(), name), 1) << name << " on " << ranks;
    }
  }
  EXPECT_EQ(ChoicesOf({}, 1, 8).size(), 1u) << "one rank exchanges nothing";
}

TEST(ExchangeOptionsOf, TakesEveryFieldOfTheConfiguration) {
  const RunSpec spec =
      SmallRun({"parallel.cp=2", "parallel.exchange.plan=KV_RING", "parallel.exchange.backward.plan=ULYSSES",
                "parallel.exchange.transport=HOST", "parallel.exchange.throttle_gb_per_second=2.5",
                "parallel.exchange.buffer_gib=0.25"});
  const ExchangeOptions options = ExchangeOptionsOf(spec, {TransportKind::kHost}, AssumedCpuCore());
  ASSERT_EQ(options.forward.size(), 1u);
  EXPECT_EQ(NameOf(options.forward[0], 2), "kv_ring");
  ASSERT_EQ(options.backward.size(), 1u);
  EXPECT_EQ(NameOf(options.backward[0], 2), "ulysses");
  EXPECT_EQ(options.transport, TransportKind::kHost);
  EXPECT_EQ(options.throttle.bytes_per_second, 2.5e9);
  EXPECT_EQ(options.buffer_bytes, int64_t{1} << 28);
  EXPECT_TRUE(options.machine == AssumedCpuCore());
  EXPECT_EQ(ExchangeOptionsOf(SmallRun({"parallel.exchange.buffer_gib=1e-12"}), {TransportKind::kHost},
                              AssumedCpuCore())
                .buffer_bytes,
            1)
      << "not: no limit";
  EXPECT_TRUE(options.forward_parts.empty()) << "a named plan has the parts it is given";
  const ExchangeOptions open =
      ExchangeOptionsOf(SmallRun({"parallel.cp=2"}), {TransportKind::kNccl}, AssumedCpuCore());
  EXPECT_FALSE(open.transport.has_value());
  EXPECT_EQ(open.forward_parts, (std::vector<int>{2, 4}));
  EXPECT_TRUE(
      ExchangeOptionsOf(SmallRun({"parallel.exchange.parts=1"}), {TransportKind::kHost}, AssumedCpuCore())
          .backward_parts.empty());
  EXPECT_EQ(open.available, std::vector{TransportKind::kNccl});
}

TEST(ProfileOf, IsTheFileOrWhatIsAssumedOfTheDevice) {
  RunSpec spec = SmallRun();
  EXPECT_TRUE(ProfileOf(spec).value() == AssumedCpuCore());
  spec.device = DeviceChoice::kCuda;
  EXPECT_TRUE(ProfileOf(spec).value() == AssumedHopper());
  EXPECT_TRUE(
      absl::StartsWith(ProfileSource(spec.parallel.exchange, AssumedHopper()), "assumed: NVIDIA H200"));

  MachineProfile mine = AssumedCpuCore();
  mine.device = "mine", mine.measured = true, mine.ranks = 3;
  const std::string path = ::testing::TempDir() + "annulus-profile.textproto";
  std::ofstream(path) << ProfileText(mine);
  spec.parallel.exchange.profile = path;
  spec.device = DeviceChoice::kCpu;
  EXPECT_TRUE(ProfileOf(spec).value() == mine);
  EXPECT_EQ(ProfileSource(spec.parallel.exchange, mine), path + ": mine, measured with 3 ranks");
  spec.parallel.exchange.throttle_gb_per_second = 0.5;
  EXPECT_TRUE(absl::EndsWith(ProfileSource(spec.parallel.exchange, mine), "; LINKS THROTTLED to 0.5 GB/s"));
  OnLoopback(2, [&](Communicator world) { EXPECT_TRUE(ProfileOf(world, spec).value() == mine); });
  std::remove(path.c_str());
  OnLoopback(2, [&](Communicator world) {
    const absl::Status status = ProfileOf(world, spec).status();
    EXPECT_TRUE(IsAgreed(status)) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), "parallel.exchange.profile=" + path)) << status;
  });
}

TEST(ProfileOf, RefusesThatOfAnotherDevice) {
  RunSpec spec = SmallRun();
  const std::string path = ::testing::TempDir() + "annulus-other-device.textproto";
  spec.parallel.exchange.profile = path;
  const auto refused = [&](const MachineProfile& machine, DeviceChoice device) {
    std::ofstream(path) << ProfileText(machine);
    spec.device = device;
    const absl::Status status = ProfileOf(spec).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << machine.device;
    return std::string(status.message());
  };
  EXPECT_EQ(refused(AssumedHopper(), DeviceChoice::kCpu),
            absl::StrCat("parallel.exchange.profile=", path,
                         ": device: \"NVIDIA H200, NVLink\": expected attention of CPUs (kernel: CPU_TILES), "
                         "forward, as the run is on CPUs"));
  EXPECT_TRUE(absl::StrContains(refused(AssumedCpuCore(), DeviceChoice::kCuda), "as the run is on GPUs"));
  MachineProfile half = AssumedCpuCore();
  std::erase_if(half.attention, [](const AttentionRate& rate) { return rate.pass == Pass::kBackward; });
  EXPECT_TRUE(absl::StrContains(refused(half, DeviceChoice::kCpu), ", backward, "));
  OnLoopback(2, [&](Communicator world) {
    const absl::Status status = ProfileOf(world, spec).status();
    EXPECT_TRUE(IsAgreed(status)) << status;
  });
  std::remove(path.c_str());
}

TEST(AttentionKindsOf, AreLayersByTheirWindow) {
  const RunSpec spec = SmallRun({"model.pattern=(A{w=3} - A -)^2 A{w=3}"});
  const std::vector<AttentionKind> kinds = AttentionKindsOf(spec.model);
  ASSERT_EQ(kinds.size(), 2u);
  EXPECT_EQ(kinds[0].attention.window, 0);
  EXPECT_EQ(kinds[0].layers, (std::vector<size_t>{2, 6}));
  EXPECT_EQ(kinds[1].attention.window, 3);
  EXPECT_EQ(kinds[1].layers, (std::vector<size_t>{0, 4, 8}));
}

TEST(AttentionCaseOf, IsATensorParallelRanks) {
  const RunSpec spec =
      SmallRun({"model.pattern=meta=3 A -", "model.attention.heads=8", "model.attention.kv_heads=2",
                "model.attention.head_dim=2", "parallel.cp=2", "parallel.tp=4"});
  const AttentionCase layer =
      AttentionCaseOf(spec, {}, {.batch = 1, .lengths = {14}, .document_starts = {}}, false);
  EXPECT_EQ(layer.heads, 2);
  EXPECT_EQ(layer.kv_heads, 1) << "fewer than ranks: each has one";
  EXPECT_EQ(layer.layout.length(), spec.data.seq_len + 3);
  EXPECT_EQ(layer.layout.local_rows() % 4, 0);
  const ExchangeOptions options = ExchangeOptionsOf(spec, {TransportKind::kHost}, AssumedCpuCore());
  for (const PlanChoice& choice : options.forward) EXPECT_EQ(2 % choice.head_split, 0);
}

TEST(StateKindsOf, AreLayersByTheirKindAndWhatTheySend) {
  const RunSpec spec =
      SmallRun({"model.pattern=M A L M", "parallel.cp=2", "parallel.layout=CONTIGUOUS", "model.mamba.heads=2",
                "model.mamba.head_dim=4", "model.mamba.state=3", "model.lightning.heads=2",
                "model.lightning.key_dim=3", "model.lightning.value_dim=5"});
  const std::vector<StateKind> kinds = StateKindsOf(spec);
  ASSERT_EQ(kinds.size(), 2u);
  EXPECT_EQ(kinds[0].branch, BranchKind::kLightning);
  EXPECT_EQ(kinds[1].layers, (std::vector<size_t>{0, 3}));
  // Two sequences of two heads: a state and a decay each, in f64; three rows of x, b and c.
  EXPECT_EQ(kinds[1].forward.state_bytes, 2 * 2 * (3 * 4 + 1) * 8);
  EXPECT_EQ(kinds[1].backward.halo_bytes, 2 * 3 * (2 * 4 + 2 * 3) * 8);
  EXPECT_EQ(
      StateText(kinds[0]),
      "1 lightning layer: a rank sends states of 512 B forward, 512 B backward; a layer and micro-batch, "
      "whatever the length");
  EXPECT_TRUE(absl::StartsWith(StateText(kinds[1]), "2 mamba layers: a rank sends states of 416 B forward"));
  EXPECT_TRUE(absl::StrContains(StateText(kinds[1]), "; rows before a convolution of 672 B forward, 672 B "));
}

}  // namespace
}  // namespace annulus::testing
