// ranks: 1 2 3 4
#include "../../comm/staged_comm.h"
#include "comm/communicator_checks.h"
#include "comm/communicator_through_device.h"
#include "support/mpi_main.h"

namespace annulus {
namespace {

TEST(Mpi, Communicates) { testing::CheckCommunicator(testing::World()); }
TEST(Mpi, Delays) { testing::CheckDelay(testing::World()); }

// Device tensors through the host, on a context of the CPU; most tensors take several pieces.
TEST(Mpi, Stages) {
  Context ctx(Device{});
  const Communicator staged = MakeStagedComm(testing::World(), ctx, "staged", 10000).value();
  testing::CheckCommunicator(
      Communicator(std::make_shared<testing::ThroughDevice>(testing::World(), staged, ctx)));
  testing::CheckHostWaitsAdvance(testing::World(), staged, ctx);
}

// Several segments of a reduction, the last of them partly filled.
TEST(Mpi, ReducesInSegments) {
  testing::CheckAllReduce<int32_t>(testing::World(), 1100003);
  testing::CheckReduceScatter<float>(testing::World(), 600001);
}

// MPI counts are int, so larger tensors travel in pieces of 16 Mi elements.
TEST(Mpi, SplitsLargeTensors) {
  Communicator world = testing::World();
  const int64_t elements = (int64_t{1} << 24) + 5;
  const auto pattern = [&](int rank) {
    std::vector<uint8_t> values(static_cast<size_t>(elements));
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = static_cast<uint8_t>(i * 31 + static_cast<size_t>(rank));
    return values;
  };
  const std::vector<uint8_t> mine = pattern(world.rank());
  std::vector<uint8_t> all(mine.size() * static_cast<size_t>(world.size()));
  std::copy(mine.begin(), mine.end(), all.begin() + elements * world.rank());
  ASSERT_TRUE(world
                  .AllGather(testing::RefOf(all).Rows(elements * world.rank(), elements * (world.rank() + 1)),
                             testing::RefOf(all))
                  .ok());
  for (int r = 0; r < world.size(); ++r) {
    const std::vector<uint8_t> theirs = pattern(r);
    EXPECT_TRUE(std::equal(theirs.begin(), theirs.end(), all.begin() + elements * r)) << "part " << r;
  }

  std::vector<uint8_t> values = mine;
  ASSERT_TRUE(world.Broadcast(testing::RefOf(values), world.size() - 1).ok());
  EXPECT_TRUE(values == pattern(world.size() - 1));

  const int next = (world.rank() + 1) % world.size(), last = (world.rank() + world.size() - 1) % world.size();
  std::vector<uint8_t> sent = mine;
  Request receive = world.Receive(testing::RefOf(values), last, 2).value();
  Request send = world.Send(testing::RefOf(sent), next, 2).value();
  ASSERT_TRUE(receive.Wait().ok());
  ASSERT_TRUE(send.Wait().ok());
  EXPECT_TRUE(values == pattern(last));
}

TEST(Mpi, AShortMessageIsAnError) {
  Communicator world = testing::World();
  std::vector<int32_t> sent(2), received(3);
  Request receive = world.Receive(testing::RefOf(received), world.rank(), 4).value();
  Request send = world.Send(testing::RefOf(sent), world.rank(), 4).value();
  EXPECT_TRUE(send.Wait().ok());
  const absl::Status status = receive.Wait();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_EQ(status.message(),
            absl::StrCat("a message from rank ", world.rank(), " with tag 4 has 2 elements: expected 3"));
}

}  // namespace
}  // namespace annulus
