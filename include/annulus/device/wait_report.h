#pragma once

// What a kernel says that gave up waiting for something that never came (wait_reports.h).

#include <cstdint>

namespace annulus {

// In pinned memory that the kernel writes.
struct alignas(16) WaitReport {
  static constexpr int32_t kNone = -1;   // it has not given up
  static constexpr int32_t kStuck = -2;  // it waited for another thread block, not for a part
  int32_t part = kNone;                  // that did not come
  uint32_t value = 0, awaited = 0;       // of its flag
  uint32_t waited_ms = 0;
};

}  // namespace annulus
