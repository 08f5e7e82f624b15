// How often a call is timed.

#include "annulus/train/measure.h"

#include <chrono>
#include <thread>

#include "trainer/trainer_testing.h"

namespace annulus::testing {
namespace {

int CallsOf(const Repeats& repeats, int call_ms) {
  Context ctx{Device{}};
  int calls = 0;
  const absl::StatusOr<double> seconds = SecondsOf(ctx, MakeLoopbackGroup(1)[0], repeats, [&] {
    ++calls;
    std::this_thread::sleep_for(std::chrono::milliseconds(call_ms));
    return absl::OkStatus();
  });
  ANNULUS_CHECK(seconds.ok()) << seconds.status();
  EXPECT_GE(*seconds, call_ms * 1e-3);
  return calls;
}

TEST(SecondsOf, TimesAsOftenAsAskedWithoutALimit) {
  EXPECT_EQ(CallsOf({.warm_ups = 2, .timed = 3}, 1), 5);
  EXPECT_EQ(CallsOf({.warm_ups = 0, .timed = 2, .calls = 4}, 0), 8);
}

TEST(SecondsOf, TimesAtLeastTwiceHoweverLongItTakes) {
  EXPECT_EQ(CallsOf({.warm_ups = 1, .timed = 50, .seconds = 1e-3}, 5), 3);
  EXPECT_EQ(CallsOf({.warm_ups = 0, .timed = 1, .seconds = 1e-3}, 5), 1) << "no more than asked for";
  EXPECT_EQ(CallsOf({.warm_ups = 1, .timed = 4, .seconds = 60}, 1), 5);
}

}  // namespace
}  // namespace annulus::testing
