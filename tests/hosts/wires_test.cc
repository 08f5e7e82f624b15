// Shaped links in virtual time: rate, delay, shared receivers, losses and cuts, to the nanosecond.

#include "hosts/wires.h"

#include <gtest/gtest.h>

namespace annulus::hosts {
namespace {

constexpr int64_t kBytes = 1226;     // 1250 with what Ethernet adds
constexpr int64_t kWireNs = 10'000;  // of that at 1 gbit
constexpr int64_t kDelayNs = 100'000;

LinkShape Gigabit() { return {.bits_per_second = 1e9, .delay_ns = kDelayNs}; }

TEST(Wires, AFrameTakesItsTimeOnTheWireOnceAndTheDelay) {
  Wires wires(2, Gigabit());
  EXPECT_EQ(wires.Send(0, 1, kBytes, 5), 5 + kWireNs + kDelayNs);
}

TEST(Wires, FramesFollowEachOtherAtTheRate) {
  Wires wires(2, Gigabit());
  for (int i = 1; i <= 100; ++i) EXPECT_EQ(wires.Send(0, 1, kBytes, 0), i * kWireNs + kDelayNs);
  EXPECT_EQ(wires.FreeAt(0), 100 * kWireNs);
}

TEST(Wires, BothWaysAtOnceAreAsFastAsOne) {
  Wires wires(2, Gigabit());
  for (int i = 1; i <= 100; ++i) {
    EXPECT_EQ(wires.Send(0, 1, kBytes, 0), i * kWireNs + kDelayNs);
    EXPECT_EQ(wires.Send(1, 0, kBytes, 0), i * kWireNs + kDelayNs);
  }
}

TEST(Wires, SendersToOneHostShareItsLink) {
  Wires wires(3, Gigabit());
  EXPECT_EQ(wires.Send(0, 2, kBytes, 0), kWireNs + kDelayNs);
  EXPECT_EQ(wires.Send(1, 2, kBytes, 0), 2 * kWireNs + kDelayNs);
  EXPECT_EQ(wires.Send(0, 1, kBytes, 0), 2 * kWireNs + kDelayNs);  // behind its own first frame alone
}

TEST(Wires, WhatTheSwitchCannotKeepIsDropped) {
  Wires wires(3, Gigabit());
  int64_t arrived = 0, sent = 2 * (kSwitchBufferBytes / 1250) * 2;
  for (int64_t i = 0; i < sent; ++i) arrived += wires.Send(static_cast<int>(i % 2), 2, kBytes, 0).has_value();
  EXPECT_LT(arrived, sent);
  EXPECT_GT(arrived, kSwitchBufferBytes / 1250);
}

TEST(Wires, NoRateTakesNoTime) {
  Wires wires(2, {.delay_ns = kDelayNs});
  EXPECT_EQ(wires.Send(0, 1, kBytes, 7), 7 + kDelayNs);
}

TEST(Wires, TheSeedDecidesWhichFramesAreLost) {
  const auto losses = [](uint64_t seed) {
    Wires wires(2, {.loss = 0.1, .seed = seed});
    std::vector<int> lost;
    for (int i = 0; i < 10'000; ++i) {
      if (!wires.Send(0, 1, kBytes, i).has_value()) lost.push_back(i);
    }
    return lost;
  };
  EXPECT_EQ(losses(1), losses(1));
  EXPECT_NE(losses(1), losses(2));
  EXPECT_NEAR(static_cast<double>(losses(1).size()), 1000, 120);  // four standard deviations of 30
}

TEST(Wires, ACutHostIsReachedFromNowhereUntilMended) {
  Wires wires(3, Gigabit());
  wires.Cut(1);
  EXPECT_EQ(wires.Send(0, 1, kBytes, 0), std::nullopt);
  EXPECT_EQ(wires.Send(1, 0, kBytes, 0), std::nullopt);
  EXPECT_TRUE(wires.Send(0, 2, kBytes, 0).has_value());
  wires.Mend(1);
  EXPECT_TRUE(wires.Send(0, 1, kBytes, 0).has_value());
}

}  // namespace
}  // namespace annulus::hosts
