// ranks: 1 2 4
//
// Communicators for device tensors: through the host always, by NCCL where every rank has a GPU of its own.

#include <sched.h>

#include "annulus/comm/gpu_communicator.h"
#include "annulus/comm/process_mesh.h"
#include "annulus/device/gpu.h"
#include "comm/communicator_checks.h"
#include "comm/communicator_through_device.h"
#include "support/mpi_main.h"

namespace annulus {
namespace {

using testing::World;

bool EveryRankHasItsGpu() { return World().size() <= GpuCount(); }

std::vector<GpuLink> Links() {
  return EveryRankHasItsGpu() ? std::vector{GpuLink::kHost, GpuLink::kNccl} : std::vector{GpuLink::kHost};
}

Device ThisGpu() {
  ANNULUS_CHECK(GpuCount() > 0) << "this test needs a GPU: " << WhyNoGpu();
  const Device device{DeviceKind::kCuda, World().rank() % GpuCount()};
  ANNULUS_CHECK_OK(UseGpu(device.index));
  return device;
}

Communicator Through(Communicator host, Communicator device, Context& ctx) {
  return Communicator(std::make_shared<testing::ThroughDevice>(host, device, ctx));
}

TEST(GpuCommunicator, ChoosesNcclUnlessRanksShareAGpu) {
  Context ctx(ThisGpu());
  const absl::StatusOr<GpuLink> link = ChooseGpuLink(World(), ctx);
  ASSERT_TRUE(link.ok()) << link.status();
  EXPECT_EQ(*link, EveryRankHasItsGpu() ? GpuLink::kNccl : GpuLink::kHost);
  if (EveryRankHasItsGpu()) return;
  const absl::Status refused = WithGpu(World(), GpuLink::kNccl, ctx).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  const std::string text =
      absl::StrCat("gpu link nccl: ranks 0 and ", GpuCount(), " share GPU ", DescribeGpu(0).value().identity,
                   ": expected a GPU of its own for every rank");
  EXPECT_EQ(refused.message(), text);
}

TEST(GpuCommunicator, RefusesAContextOnTheCpu) {
  Context ctx(Device{});
  const absl::Status refused = WithGpu(World(), GpuLink::kHost, ctx).status();
  EXPECT_EQ(refused.message(), "device=cpu: expected a GPU for tensors by host memory");
}

TEST(GpuCommunicator, Communicates) {
  for (const GpuLink link : Links()) {
    SCOPED_TRACE(std::string(Name(link)));
    Context ctx(ThisGpu());
    const Communicator gpu = WithGpu(World(), link, ctx).value();
    const Communicator through = Through(World(), gpu, ctx);
    testing::CheckEveryDType(through);
    testing::CheckAdjoints(through);
    testing::CheckMessages(through);
    testing::CheckBackground(through);
    testing::CheckAgreeOk(through);
    testing::CheckStrings(through);
    testing::CheckSplit(through);
    testing::CheckHostWaitsAdvance(World(), gpu, ctx);
    testing::CheckCommunicator(gpu);  // host tensors
    if (link == GpuLink::kHost) {
      testing::CheckSumOrder(through);
      testing::CheckSumRounding(through);
    }
  }
}

TEST(GpuCommunicator, GroupsOfOneCopy) {
  for (const GpuLink link : Links()) {
    SCOPED_TRACE(std::string(Name(link)));
    Context ctx(ThisGpu());
    Communicator alone = World().Split(World().rank(), 0).value();
    testing::CheckEveryDType(Through(alone, WithGpu(alone, link, ctx).value(), ctx));
  }
}

// Beyond the 64 MiB of a piece in pinned memory, and not a multiple of anything.
TEST(GpuCommunicator, MovesLargeTensors) {
  for (const GpuLink link : Links()) {
    SCOPED_TRACE(std::string(Name(link)));
    Context ctx(ThisGpu());
    Communicator comm = Through(World(), WithGpu(World(), link, ctx).value(), ctx);
    const int64_t elements = 17'000'003;
    testing::CheckAllReduce<float>(comm, elements);
    testing::CheckAllGather<float>(comm, elements);
    testing::CheckReduceScatter<float>(comm, elements);
    testing::CheckBroadcast<float>(comm, elements);

    const int rank = comm.rank(), next = (rank + 1) % comm.size(),
              last = (rank + comm.size() - 1) % comm.size();
    std::vector<float> sent = testing::Integers<float>(rank, elements, 8), received(sent.size());
    Request send = comm.Send(testing::RefOf(sent), next, 2).value();
    Request receive = comm.Receive(testing::RefOf(received), last, 2).value();
    ASSERT_TRUE(send.Wait().ok());
    ASSERT_TRUE(receive.Wait().ok());
    EXPECT_TRUE(received == testing::Integers<float>(last, elements, 8));
  }
}

// Completes on the device (Test) or for the stream (Wait), by turns.
absl::Status Complete(Request request, int round) {
  while (round % 2 == 1) {
    ANNULUS_ASSIGN_OR_RETURN(const bool complete, request.Test());
    if (complete) return absl::OkStatus();
    sched_yield();
  }
  return request.Wait();
}

// Rounds of collectives and messages on tensors that are written late, behind slow work, and overwritten at
// once after the operation: the host never waits for the stream in between.
class OrderCheck {
 public:
  OrderCheck(Communicator comm, Context& ctx) : comm_(std::move(comm)), ctx_(ctx) {}

  void Run() {
    std::vector<int32_t> values;
    for (int round = 0; round < kRounds; ++round) {
      for (int64_t i = 0; i < kElements; ++i) values.push_back(Value(comm_.rank(), round, i));
    }
    Upload(ctx_, values.data(), source_.ref().bytes(), source_.ref());
    for (int round = 0; round < kRounds; ++round) ASSERT_EQ(Round(round), absl::OkStatus()) << round;
    Compare();
  }

 private:
  static constexpr int kRounds = 40;
  static constexpr int64_t kElements = 1 << 16;

  static int32_t Value(int rank, int round, int64_t i) {
    return static_cast<int32_t>((rank + 1) * 1000003 + round * 7919 + i);
  }
  int64_t Size() const { return comm_.size(); }
  int Last() const { return (comm_.rank() + comm_.size() - 1) % comm_.size(); }

  absl::Status Round(int round) {
    const StreamHandle stream = ctx_.stream();
    const TensorRef x = x_.ref(), gathered = gathered_.ref(), part = part_.ref();
    const auto keep = [&](const TensorRef& from, const Tensor& to) {
      CopyBytes(from, to.ref().Rows(round, round + 1).Reshaped({from.elements()}), stream);
    };
    const auto slow = [&] {
      for (int i = 0; i < 4; ++i) CopyBytes(slow_from_.ref(), slow_to_.ref(), stream);
    };
    slow();
    CopyBytes(source_.ref().Rows(round, round + 1).Reshaped({kElements}), x, stream);
    ANNULUS_ASSIGN_OR_RETURN(Request gather, comm_.IAllGather(x, gathered));
    slow();  // runs beside it
    ANNULUS_RETURN_IF_ERROR(Complete(std::move(gather), round));
    keep(gathered, kept_gathered_);
    ZeroBytes(x, stream);

    ANNULUS_ASSIGN_OR_RETURN(Request scatter, comm_.IReduceScatter(gathered, part));
    ANNULUS_RETURN_IF_ERROR(Complete(std::move(scatter), round));
    ZeroBytes(gathered, stream);
    keep(part, kept_part_);
    if (Size() == 1) return absl::OkStatus();

    slow();
    CopyBytes(source_.ref().Rows(round, round + 1).Reshaped({kElements}), x, stream);
    ANNULUS_ASSIGN_OR_RETURN(Request send, comm_.Send(x, (comm_.rank() + 1) % comm_.size(), 0));
    ANNULUS_ASSIGN_OR_RETURN(Request receive, comm_.Receive(part, Last(), 0));
    ANNULUS_RETURN_IF_ERROR(Complete(std::move(send), round));
    ZeroBytes(x, stream);
    ANNULUS_RETURN_IF_ERROR(Complete(std::move(receive), round));
    keep(part, kept_message_);
    ZeroBytes(part, stream);
    return absl::OkStatus();
  }

  void Compare() {
    const auto download = [&](const Tensor& tensor) {
      std::vector<int32_t> host(static_cast<size_t>(tensor.ref().elements()));
      Download(ctx_, tensor.ref(), host.data());
      return host;
    };
    std::vector<int32_t> gathered, part, message;
    for (int round = 0; round < kRounds; ++round) {
      for (int rank = 0; rank < comm_.size(); ++rank) {
        for (int64_t i = 0; i < kElements; ++i) gathered.push_back(Value(rank, round, i));
      }
      for (int64_t i = 0; i < kElements; ++i) {
        part.push_back(comm_.size() * Value(comm_.rank(), round, i));
        message.push_back(Value(Last(), round, i));
      }
    }
    EXPECT_TRUE(download(kept_gathered_) == gathered);
    EXPECT_TRUE(download(kept_part_) == part);
    if (Size() == 1) message.assign(message.size(), 0);  // a rank sends to others only
    EXPECT_TRUE(download(kept_message_) == message);
  }

  Communicator comm_;
  Context& ctx_;
  Tensor NewI32(Shape shape) { return Tensor(ctx_.device, DType::kI32, shape); }
  Tensor slow_from_ = NewI32({1 << 24}), slow_to_ = NewI32({1 << 24});  // 64 MiB
  Tensor source_ = NewI32({kRounds, kElements});
  Tensor x_ = NewI32({kElements}), gathered_ = NewI32({Size() * kElements}), part_ = NewI32({kElements});
  Tensor kept_gathered_ = NewI32({kRounds, Size() * kElements});
  Tensor kept_part_ = NewI32({kRounds, kElements}), kept_message_ = NewI32({kRounds, kElements});
};

TEST(GpuCommunicator, IsOrderedByTheStream) {
  for (const GpuLink link : Links()) {
    SCOPED_TRACE(std::string(Name(link)));
    Context ctx(ThisGpu());
    OrderCheck(WithGpu(World(), link, ctx).value(), ctx).Run();
  }
}

TEST(GpuCommunicator, UpgradesTheMeshAndNotesWhatItDoes) {
  for (const GpuLink link : Links()) {
    SCOPED_TRACE(std::string(Name(link)));
    Context ctx(ThisGpu());
    const int dp = World().size() >= 4 ? 2 : 1;
    ProcessMesh mesh = ProcessMesh::Create({.dp = dp, .cp = World().size() / dp}, World()).value();
    ASSERT_EQ(mesh.UseGpu(link, ctx), absl::OkStatus());
    for (Communicator* group : {&mesh.dp, &mesh.cp, &mesh.dp_cp}) {
      Tensor ones(ctx.device, DType::kF32, {5});
      const std::vector<float> one(5, 1.0f);
      Upload(ctx, one.data(), ones.ref().bytes(), ones.ref());
      ASSERT_EQ(group->AllReduce(ones.ref(), ReduceOp::kSum), absl::OkStatus());
      std::vector<float> sum(5);
      Download(ctx, ones.ref(), sum.data());
      EXPECT_EQ(sum, std::vector<float>(5, static_cast<float>(group->size())));
      EXPECT_TRUE(group->Health().ok());
    }
    const std::string report = ctx.recorder.Report();
    const bool noted = report.find("collectives cp: finished `all-reduce f32 [5]`") != std::string::npos;
    EXPECT_EQ(noted, mesh.cp.size() > 1) << report;
  }
}

TEST(GpuCommunicator, NcclRefusesToGoOnAfterAbort) {
  for (const GpuLink link : Links()) {
    SCOPED_TRACE(std::string(Name(link)));
    Context ctx(ThisGpu());
    Communicator gpu = WithGpu(World(), link, ctx).value();
    Tensor x(ctx.device, DType::kF32, {5});
    ASSERT_EQ(gpu.AllReduce(x.ref(), ReduceOp::kSum), absl::OkStatus());
    ctx.lane.Synchronize();
    ASSERT_TRUE(World().Barrier().ok());  // no peer is in the operation any more
    gpu.Abort();
    const bool given_up = link == GpuLink::kNccl && World().size() > 1;  // hosts have nothing to give up
    EXPECT_EQ(gpu.AllReduce(x.ref(), ReduceOp::kSum).code(),
              given_up ? absl::StatusCode::kAborted : absl::StatusCode::kOk);
  }
}

}  // namespace
}  // namespace annulus
