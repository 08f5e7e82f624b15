// What ranks compute on when they do not all find the same, and memory that is not there.

#include "annulus/train/placement.h"

#include "absl/strings/match.h"
#include "annulus/device/buffer.h"
#include "trainer/trainer_testing.h"

namespace annulus::testing {
namespace {

// What each rank made of the spec. The ranks can still talk to each other.
struct Resolved {
  absl::Status status;
  DeviceChoice device = DeviceChoice::kAuto;
};
std::vector<Resolved> Resolve(const std::vector<int>& gpus, DeviceChoice device, ComputeType compute) {
  std::vector<Resolved> resolved(gpus.size());
  RunSpec spec = SmallRun();
  spec.device = device;
  spec.compute = compute;
  OnLoopback(
      static_cast<int>(gpus.size()),
      [&](Communicator world) {
        const size_t rank = static_cast<size_t>(world.rank());
        RunSpec mine = spec;
        resolved[rank].status = ResolveDevice(world, gpus[rank], &mine);
        resolved[rank].device = mine.device;
        EXPECT_TRUE(world.Barrier().ok());
      },
      /*timeout_seconds=*/20);
  return resolved;
}

TEST(ResolveDevice, TakesWhatAllRanksFind) {
  const auto device_of_all = [](const std::vector<int>& gpus, DeviceChoice device, ComputeType compute,
                                DeviceChoice expected) {
    for (const Resolved& rank : Resolve(gpus, device, compute)) {
      EXPECT_TRUE(rank.status.ok()) << rank.status;
      EXPECT_EQ(rank.device, expected);
    }
  };
  constexpr DeviceChoice kAuto = DeviceChoice::kAuto, kCpu = DeviceChoice::kCpu, kCuda = DeviceChoice::kCuda;
  device_of_all({8, 1, 2}, kAuto, ComputeType::kF32, kCuda);
  device_of_all({0, 0, 0}, kAuto, ComputeType::kAuto, kCpu);
  // Nobody is asked where the spec has decided.
  device_of_all({4, 0, 4}, kCpu, ComputeType::kF32, kCpu);
  device_of_all({4, 0, 4}, kAuto, ComputeType::kF64, kCpu);
  device_of_all({1}, kCuda, ComputeType::kF32, kCuda);
}

TEST(ResolveDevice, RefusesGpusOnSomeRanksAlone) {
  for (const auto& [gpus, with, without] : {std::tuple{std::vector{4, 4, 0}, "rank 0 on ", "rank 2 on "},
                                            {std::vector{0, 2, 0, 2}, "rank 1 on ", "rank 0 on "}}) {
    const std::vector<Resolved> ranks = Resolve(gpus, DeviceChoice::kAuto, ComputeType::kAuto);
    for (const Resolved& rank : ranks) {
      EXPECT_TRUE(IsAgreed(rank.status)) << rank.status;
      EXPECT_EQ(rank.status.message(), ranks[0].status.message());
    }
    const std::string message(ranks[0].status.message());
    EXPECT_TRUE(absl::StartsWith(message, absl::StrCat("device=AUTO: ", with))) << message;
    for (const absl::string_view part :
         {" finds a GPU, ", without, " none: expected device=CPU", "device=CUDA"})
      EXPECT_TRUE(absl::StrContains(message, part)) << part << "\n" << message;
  }
}

TEST(ResolveDevice, CudaNeedsAGpuOnEveryRank) {
  for (const Resolved& rank : Resolve({1, 0, 1}, DeviceChoice::kCuda, ComputeType::kF32)) {
    EXPECT_TRUE(IsAgreed(rank.status)) << rank.status;
    EXPECT_TRUE(absl::StartsWith(rank.status.message(), "rank 1: device=CUDA: expected a GPU"))
        << rank.status;
  }
}

// All ranks fail if one would hold more than its share, here of three on one host.
TEST(CheckMemory, IsOfWhatRanksOfAHostShare) {
  const int64_t available = AvailableMemoryBytes();
  ASSERT_GT(available, 0);
  const auto check = [](const std::vector<int64_t>& bytes) {
    std::vector<absl::Status> statuses(bytes.size());
    OnLoopback(static_cast<int>(bytes.size()), [&](Communicator world) {
      const size_t rank = static_cast<size_t>(world.rank());
      statuses[rank] = CheckMemory(world, Device{}, bytes[rank], "a table of", "lower --rows");
    });
    return statuses;
  };
  for (const absl::Status& status : check({available / 6, 0, available / 6}))
    EXPECT_TRUE(status.ok()) << status;
  for (const absl::Status& status : check({0, available / 2, 0})) {
    EXPECT_TRUE(IsAgreed(status)) << status;
    EXPECT_TRUE(absl::StartsWith(status.message(), "rank 1: memory: a table of ")) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), " that are available to 3 ranks on ")) << status;
    EXPECT_TRUE(absl::EndsWith(status.message(), ": lower --rows")) << status;
  }
}

}  // namespace
}  // namespace annulus::testing
