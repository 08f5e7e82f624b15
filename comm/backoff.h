#pragma once

// How a rank waits: yields first, then sleeps briefly, because ranks may outnumber cores and a spinning
// waiter would slow down the rank that it waits for.

#include <sched.h>
#include <unistd.h>

namespace annulus {

class Backoff {
 public:
  void Pause() {
    if (++polls_ <= kYields) {
      sched_yield();
    } else {
      usleep(kSleepUs);
    }
  }

 private:
  static constexpr int kYields = 300;  // a fraction of a millisecond when the core is free
  static constexpr int kSleepUs = 20;  // below the timer slack: the wake-up adds about 50 us
  int polls_ = 0;
};

}  // namespace annulus
