// Latency of messages and what they cost computing that runs beside them: measured where it is known.

#include <chrono>

#include "annulus/comm/exchange_bench.h"
#include "gtest/gtest.h"
#include "support/loopback.h"

namespace annulus {
namespace {

std::unique_ptr<ExchangeTransport> HostTransport(const Communicator& comm, Context& ctx) {
  return MakeTransport(TransportKind::kHost, comm, ctx).value();
}

TEST(MeasureMessageSeconds, SeesADelayOfEveryMessage) {
  for (const int ranks : {2, 3}) {
    testing::OnLoopback(ranks, [](Communicator comm) {
      Context ctx{Device{}};
      constexpr double kDelayUs = 2000;
      const auto plain = HostTransport(comm, ctx);
      const absl::StatusOr<double> without = MeasureMessageSeconds(ctx, comm, *plain, 3);
      ASSERT_TRUE(without.ok()) << without.status();
      EXPECT_GT(*without, 0);
      const auto delayed = HostTransport(WithMessageDelay(comm, kDelayUs), ctx);
      const absl::StatusOr<double> with = MeasureMessageSeconds(ctx, comm, *delayed, 3);
      ASSERT_TRUE(with.ok()) << with.status();
      EXPECT_GE(*with, kDelayUs * 1e-6);
      EXPECT_GT(*with, *without);
    });
  }
}

// Computes for a given time, however long its polls take; returns how many polls that were.
absl::Status Spin(Context& ctx, double seconds) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (std::chrono::steady_clock::now() < end) ctx.Poll();
  return absl::OkStatus();
}

TEST(MeasureSlowdown, IsOneWhereComputingTakesAGivenTime) {
  testing::OnLoopback(2, [](Communicator comm) {
    Context ctx{Device{}};
    const auto transport = HostTransport(comm, ctx);
    const absl::StatusOr<double> slowdown =
        MeasureSlowdown(ctx, comm, *transport, 1 << 12, [&] { return Spin(ctx, 0.005); }, 3);
    ASSERT_TRUE(slowdown.ok()) << slowdown.status();
    EXPECT_GE(*slowdown, 1.0);
    EXPECT_LT(*slowdown, 2.0);
  });
}

TEST(MeasureSlowdown, SeesWhatPollingTakesFromAFixedAmountOfWork) {
  testing::OnLoopback(2, [](Communicator comm) {
    Context ctx{Device{}};
    const auto transport = HostTransport(comm, ctx);
    // Polls are all there is to do: they take longer where each finds messages to move.
    const auto polls = [&]() -> absl::Status {
      for (int i = 0; i < 2000; ++i) ctx.Poll();
      return absl::OkStatus();
    };
    const absl::StatusOr<double> slowdown = MeasureSlowdown(ctx, comm, *transport, 1 << 20, polls, 3);
    ASSERT_TRUE(slowdown.ok()) << slowdown.status();
    EXPECT_GT(*slowdown, 1.5);
  });
}

TEST(Probes, RefuseWhatCannotBeMeasured) {
  testing::OnLoopback(1, [](Communicator comm) {
    Context ctx{Device{}};
    const auto transport = HostTransport(comm, ctx);
    EXPECT_EQ(MeasureMessageSeconds(ctx, comm, *transport).status().message(),
              "ranks=1: expected at least 2 to exchange between");
    EXPECT_EQ(MeasureSlowdown(
                  ctx, comm, *transport, 8, [] { return absl::OkStatus(); }, 0)
                  .status()
                  .code(),
              absl::StatusCode::kInvalidArgument);
  });
  testing::OnLoopback(2, [](Communicator comm) {
    Context ctx{Device{}};
    const auto transport = HostTransport(comm, ctx);
    const bool fails = comm.rank() == 1;
    const absl::Status status = MeasureSlowdown(ctx, comm, *transport, 8, [&]() -> absl::Status {
                                  return fails ? absl::InternalError("no kernel") : absl::OkStatus();
                                }).status();
    EXPECT_TRUE(status.ToString().find("no kernel") != std::string::npos) << status;
  });
}

}  // namespace
}  // namespace annulus
