#include <gtest/gtest.h>

#include <chrono>

#include "comm/communicator_checks.h"

namespace annulus {
namespace {

class Loopback : public ::testing::TestWithParam<int> {};

TEST_P(Loopback, Communicates) { testing::OnLoopback(GetParam(), testing::CheckCommunicator); }
TEST_P(Loopback, Delays) { testing::OnLoopback(GetParam(), testing::CheckDelay); }

INSTANTIATE_TEST_SUITE_P(Ranks, Loopback, ::testing::Range(1, 9));

TEST(LoopbackFailure, ASendIsNotCompleteBeforeItsReceive) {
  std::vector<Communicator> comms = MakeLoopbackGroup(2);
  std::vector<int32_t> out = {7}, in = {0};
  Request send = comms[0].Send(testing::RefOf(out), 1, 3).value();
  EXPECT_FALSE(send.Test().value());
  out[0] = 8;  // still the sender's: a bug of the caller that the receiver sees
  Request receive = comms[1].Receive(testing::RefOf(in), 0, 3).value();
  EXPECT_TRUE(receive.Test().value());
  EXPECT_TRUE(send.Test().value());
  EXPECT_EQ(in[0], 8);
}

TEST(LoopbackFailure, SizesMustMatch) {
  std::vector<Communicator> comms = MakeLoopbackGroup(2);
  std::vector<int32_t> out(3), in(2);
  Request send = comms[0].Send(testing::RefOf(out), 1, 3).value();
  Request receive = comms[1].Receive(testing::RefOf(in), 0, 3).value();
  EXPECT_EQ(send.Test().status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(receive.Test().status().message(), "a message of 12 bytes meets a receive of 8 bytes");
  EXPECT_TRUE(send.done() && receive.done());
}

TEST(LoopbackFailure, CollectivesMustMatch) {
  testing::OnLoopback(3, [](Communicator comm) {
    std::vector<float> values(comm.rank() == 1 ? 3 : 4);
    const absl::Status status = comm.AllReduce(testing::RefOf(values), ReduceOp::kSum);
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
  });
}

TEST(LoopbackFailure, AMissingRankEndsTheOthers) {
  const auto begin = std::chrono::steady_clock::now();
  testing::OnLoopback(
      3,
      [](Communicator comm) {
        if (comm.rank() == 2) return;  // failed
        const absl::Status status = comm.Barrier();
        EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
        EXPECT_EQ(comm.Barrier().code(), absl::StatusCode::kDeadlineExceeded);
      },
      0.2);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(60));
}

TEST(RequestDeathTest, AnIncompleteRequestMustNotBeDropped) {
  EXPECT_EXIT(
      {
        std::vector<Communicator> comms = MakeLoopbackGroup(2);
        std::vector<int32_t> in = {0};
        const absl::StatusOr<Request> receive = comms[1].Receive(testing::RefOf(in), 0, 3);
      },
      ::testing::ExitedWithCode(kInvariantExitCode), "an incomplete request is destroyed");
}

}  // namespace
}  // namespace annulus
