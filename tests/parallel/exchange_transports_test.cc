// Transports that several geometries of a group share.

#include "annulus/parallel/exchange_transports.h"

#include <gtest/gtest.h>

#include "annulus/parallel/attention_geometry.h"
#include "support/loopback.h"

namespace annulus::testing {
namespace {

TEST(ExchangeTransports, AreMadeOnceAndShared) {
  OnLoopback(2, [&](Communicator cp) {
    Context ctx{Device{}};
    const SequenceLayout layout(LayoutKind::kZigzag, 8, 2);
    const auto shared = std::make_shared<ExchangeTransports>(cp, LinkThrottle{});
    ExchangeTransport* const made = shared->Of(ctx, TransportKind::kHost).value();
    EXPECT_EQ(shared->Of(ctx, TransportKind::kHost).value(), made);
    {
      AttentionGeometry first(layout, cp, {}, shared);
      EXPECT_EQ(first.Transport(ctx, TransportKind::kHost).value(), made);
    }
    AttentionGeometry second(layout, cp, {}, shared), apart(layout, cp);
    EXPECT_EQ(second.Transport(ctx, TransportKind::kHost).value(), made) << "outlives those that used it";
    EXPECT_NE(apart.Transport(ctx, TransportKind::kHost).value(), made);
    // What cannot be is refused again and again, and counts for nothing.
    for (int i = 0; i < 2; ++i) EXPECT_FALSE(shared->Of(ctx, TransportKind::kNccl).ok());
    EXPECT_EQ(shared->device_bytes(), 0);
  });
}

TEST(ExchangeTransportsDeath, AnotherRateIsNoticed) {
  const auto build = [] {
    Communicator cp = MakeLoopbackGroup(1)[0];
    const auto slow = std::make_shared<ExchangeTransports>(cp, LinkThrottle{1e9});
    AttentionGeometry geometry(SequenceLayout(LayoutKind::kZigzag, 8, 1), cp, {}, slow);
  };
  EXPECT_DEATH(build(), "transports at another rate");
}

}  // namespace
}  // namespace annulus::testing
