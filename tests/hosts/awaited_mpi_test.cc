// ranks: 2 3
// A rank that waits can say for whom, from another thread; one that waits for nothing says nothing.

#include <chrono>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "annulus/comm/awaited.h"
#include "support/mpi_main.h"

namespace annulus {
namespace {

using testing::World;

constexpr char kNobody[] = "";

std::string AskedFromAnotherThread() {
  std::string text;
  std::thread([&] { text = AwaitedRanks(); }).join();
  return text;
}

// Of a group in which this rank's neighbour has another number than in the world.
TEST(Awaited, NamesTheRankOfTheWorldUntilItsMessageIsThere) {
  Communicator world = World();
  const int size = world.size(), last = size - 1;
  Communicator reversed = world.Split(0, size - world.rank()).value();
  EXPECT_EQ(AskedFromAnotherThread(), kNobody);
  int32_t value = 0;
  const TensorRef ref(&value, DType::kI32, Device{}, {1});
  if (world.rank() == 0) {
    Request receive = reversed.Receive(ref, 0, 3).value();
    const std::string text = AskedFromAnotherThread();
    EXPECT_TRUE(absl::StartsWith(text, absl::StrCat("rank ", last, " on "))) << text;
    EXPECT_FALSE(absl::StrContains(text, ",")) << text;
    EXPECT_TRUE(world.Barrier().ok());
    EXPECT_TRUE(receive.Wait().ok());
  } else {
    EXPECT_TRUE(world.Barrier().ok());
    if (world.rank() == last) {
      EXPECT_TRUE(reversed.Send(ref, size - 1, 3).value().Wait().ok());
    }
  }
  EXPECT_EQ(AskedFromAnotherThread(), kNobody);
}

// Messages of two ranks, of which that of the last never comes until the others have named it alone.
TEST(Awaited, LeavesOutThoseWhoseMessagesHaveCome) {
  Communicator world = World();
  const int last = world.size() - 1;
  const std::string only = absl::StrCat("rank ", last, " on ");
  std::vector<int64_t> values(static_cast<size_t>(world.size()), 1);  // of which each rank sums one
  const TensorRef ref(values.data(), DType::kI64, Device{}, {world.size()});
  if (world.rank() == last) std::this_thread::sleep_for(std::chrono::seconds(1));
  Request sum = world.IAllReduce(ref, ReduceOp::kSum).value();
  if (world.rank() != last) {
    bool named_alone = false;
    for (absl::StatusOr<bool> done = false; !*done && !named_alone; done = sum.Test()) {
      const std::string text = AwaitedRanks();
      named_alone = absl::StartsWith(text, only);
      ASSERT_TRUE(done.ok()) << done.status();
    }
    EXPECT_TRUE(named_alone);
  }
  EXPECT_TRUE(sum.Wait().ok());
  EXPECT_EQ(values, std::vector<int64_t>(values.size(), world.size()));
  EXPECT_EQ(AwaitedRanks(), kNobody);
}

}  // namespace
}  // namespace annulus
