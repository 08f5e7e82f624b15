// Transports on the CPU; those of GPUs are in tests/gpu.

#include "annulus/comm/exchange_bench.h"
#include "comm/communicator_checks.h"
#include "comm/exchange_cases.h"

namespace annulus {
namespace {

TEST(Transport, HasAName) {
  EXPECT_EQ(Name(TransportKind::kHost), "host");
  EXPECT_EQ(Name(TransportKind::kNccl), "nccl");
  EXPECT_EQ(Name(TransportKind::kCopyEngine), "copy engine");
}

TEST(Transport, OfCpusIsTheHost) {
  testing::OnLoopback(2, [](Communicator comm) {
    Context ctx{Device{}};
    EXPECT_EQ(ChooseTransport(comm, ctx).value(), TransportKind::kHost);
    for (const TransportKind kind : {TransportKind::kNccl, TransportKind::kCopyEngine}) {
      const absl::Status refused = MakeTransport(kind, comm, ctx).status();
      EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_EQ(refused.message().find(absl::StrCat("exchange by ", Name(kind))), 0u) << refused;
    }
  });
}

TEST(HostTransport, RunsPlansInScratchMemory) {
  testing::OnLoopback(3, [](Communicator comm) {
    Context ctx{Device{}};
    const std::unique_ptr<ExchangeTransport> transport =
        MakeTransport(TransportKind::kHost, comm, ctx).value();
    EXPECT_EQ(transport->kind(), TransportKind::kHost);
    EXPECT_TRUE(transport->Health().ok());
    const testing::ExchangeCase made = testing::ExchangeCaseMaker(1).Make(
        3, 4, 12, testing::CaseLayout::kZigzag, testing::CaseMask::kCausal);
    for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
      const ExchangePlan plan = BuildKvRing(made.problem, pass);
      testing::ToyRank rank(made, plan, comm.rank());
      const std::vector<SlotSpec>& specs = plan.ranks[static_cast<size_t>(comm.rank())].slots;
      TensorRef home_kv, home_grad;
      for (size_t i = 0; i < specs.size(); ++i) {
        if (specs[i].home) (specs[i].payload == Payload::kKv ? home_kv : home_grad) = rank.refs()[i];
      }
      const ArenaScope scope(ctx.scratch);
      ExchangeBinding binding{.slots = transport->Slots(ctx, plan, home_kv, home_grad).value()};
      ASSERT_EQ(binding.slots.size(), specs.size());
      rank.Bind(binding.slots);
      binding.attend = [&](const Step& step) {
        rank.Attend(step);
        return absl::OkStatus();
      };
      ExchangeStats stats;
      ASSERT_TRUE(transport->Execute(ctx, plan, binding, &stats).ok());
      EXPECT_EQ(rank.Compare(), "");
      EXPECT_EQ(stats.bytes_sent, BytesSent(plan, comm.rank(), 16, 16));
      // Waiting is the context's clock's, too.
      EXPECT_NEAR(ctx.waits.TakeSeconds(WaitKind::kExchange), stats.exposed_seconds, 1e-3);
    }
  });
}

TEST(MeasureExchange, CountsBytesOfAllRanks) {
  testing::OnLoopback(3, [](Communicator comm) {
    Context ctx{Device{}};
    const std::unique_ptr<ExchangeTransport> transport =
        MakeTransport(TransportKind::kHost, comm, ctx).value();
    const absl::StatusOr<ExchangeRate> rate = MeasureExchange(ctx, comm, *transport, 1 << 20, 3);
    ASSERT_TRUE(rate.ok()) << rate.status();
    EXPECT_GT(rate->one_way_gb_per_second, 1e-3);
    EXPECT_LT(rate->one_way_gb_per_second, 1e3);
    EXPECT_GT(rate->both_ways_gb_per_second, 1e-3);
    EXPECT_LT(rate->both_ways_gb_per_second, 1e3);
  });
}

TEST(MeasureExchange, RefusesWhatHasNoRate) {
  testing::OnLoopback(1, [](Communicator comm) {
    Context ctx{Device{}};
    const std::unique_ptr<ExchangeTransport> transport =
        MakeTransport(TransportKind::kHost, comm, ctx).value();
    EXPECT_EQ(MeasureExchange(ctx, comm, *transport, 1 << 20).status().message(),
              "ranks=1: expected at least 2 to exchange between");
  });
  testing::OnLoopback(2, [](Communicator comm) {
    Context ctx{Device{}};
    const std::unique_ptr<ExchangeTransport> transport =
        MakeTransport(TransportKind::kHost, comm, ctx).value();
    EXPECT_EQ(MeasureExchange(ctx, comm, *transport, 1).status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(MeasureExchange(ctx, comm, *transport, 8, 0).status().code(),
              absl::StatusCode::kInvalidArgument);
  });
}

}  // namespace
}  // namespace annulus
