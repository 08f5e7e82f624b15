#include <gtest/gtest.h>

#include <chrono>

#include "../../comm/progress.h"
#include "../../comm/staged_comm.h"
#include "annulus/comm/gpu_communicator.h"
#include "comm/communicator_checks.h"
#include "comm/communicator_through_device.h"

namespace annulus {
namespace {

class Loopback : public ::testing::TestWithParam<int> {};

TEST_P(Loopback, Communicates) { testing::OnLoopback(GetParam(), testing::CheckCommunicator); }
TEST_P(Loopback, Delays) { testing::OnLoopback(GetParam(), testing::CheckDelay); }

// Device tensors through the host, on a context of the CPU; most tensors take several pieces.
TEST_P(Loopback, Stages) {
  testing::OnLoopback(GetParam(), [](Communicator comm) {
    Context ctx(Device{});
    for (const int64_t piece_bytes : {int64_t{100}, int64_t{10000}, kStagedPieceBytes}) {
      const Communicator staged = MakeStagedComm(comm, ctx, "staged", piece_bytes).value();
      const Communicator through(std::make_shared<testing::ThroughDevice>(comm, staged, ctx));
      testing::CheckEveryDType(through);
      if (piece_bytes == 100)
        continue;  // the longer tensors of the other checks would take thousands of pieces
      testing::CheckCommunicator(through);
      testing::CheckHostWaitsAdvance(comm, staged, ctx);
    }
  });
}

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

TEST(StagedFailure, SizesMustMatch) {
  testing::OnLoopback(2, [](Communicator comm) {
    Context ctx(Device{});
    Communicator staged = MakeStagedComm(comm, ctx, "staged").value();
    std::vector<int32_t> values(comm.rank() == 0 ? 3 : 2);
    Request request = comm.rank() == 0 ? staged.Send(testing::RefOf(values), 1, 3).value()
                                       : staged.Receive(testing::RefOf(values), 0, 3).value();
    EXPECT_EQ(request.Wait().message(), "a message of 12 bytes meets a receive of 8 bytes");
    EXPECT_TRUE(request.done());
  });
}

TEST(StagedDeathTest, RefusesMessagesToItself) {
  std::vector<Communicator> comms = MakeLoopbackGroup(1);
  Context ctx(Device{});
  Communicator staged = MakeStagedComm(comms[0], ctx, "staged").value();
  std::vector<int32_t> values(3);
  EXPECT_EXIT(static_cast<void>(staged.Send(testing::RefOf(values), 0, 3)),
              ::testing::ExitedWithCode(kInvariantExitCode), "send i32 .3. to 0 by rank 0 of 1");
}

TEST(GpuLinks, AContextOnTheCpuHasNone) {
  testing::OnLoopback(2, [](Communicator comm) {
    Context ctx(Device{});
    const absl::Status chosen = ChooseGpuLink(comm, ctx).status();
    EXPECT_EQ(chosen.message(), "device=cpu: expected a GPU");
    for (const GpuLink link : {GpuLink::kNccl, GpuLink::kHost}) EXPECT_FALSE(WithGpu(comm, link, ctx).ok());
  });
  EXPECT_EQ(Name(GpuLink::kNccl), "nccl");
  EXPECT_EQ(Name(GpuLink::kHost), "host memory");
}

// What an operation may do to the others while it advances.
TEST(Progress, OperationsAddAndRemoveOthersWhileAdvancing) {
  struct Counted : PolledOperation {
    void Advance() override {
      ++advances;
      if (then) then();
    }
    int advances = 0;
    std::function<void()> then;
  };
  CommProgress progress;
  Counted first, removed, added, last;
  first.then = [&] {
    progress.Remove(&removed);
    progress.Add(&added);
    progress.Remove(&first);
    progress.Poll();  // from within: nothing
  };
  for (Counted* operation : {&first, &removed, &last}) progress.Add(operation);
  for (int i = 0; i < 2; ++i) progress.Poll();
  EXPECT_EQ(first.advances, 1);
  EXPECT_EQ(removed.advances, 0);
  EXPECT_EQ(added.advances, 2);
  EXPECT_EQ(last.advances, 2);
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
