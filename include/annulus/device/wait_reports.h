#pragma once

// Reports of kernels that gave up waiting. Such a kernel ends by a trap: every later CUDA call of the process
// fails, and its failure is printed with the reports (WhyKernelsGaveUp).

#include <mutex>
#include <string>
#include <vector>

#include "annulus/device/buffer.h"
#include "annulus/device/wait_report.h"

namespace annulus {

// Places for the reports of the last launches, more than the host can be ahead of the device.
class WaitReports {
 public:
  explicit WaitReports(Device device);
  WaitReports(const WaitReports&) = delete;
  WaitReports& operator=(const WaitReports&) = delete;
  ~WaitReports();

  // Of a launch that waits for the parts so named.
  WaitReport* Add(std::vector<std::string> parts);

  // "waited 20000 ms for rank 1 step 5 (receive ...): its flag is 6, awaited 7"; empty if no kernel gave up.
  // From any thread.
  std::string Text() const;

 private:
  static constexpr size_t kPlaces = 512;
  WaitReport* places() const { return static_cast<WaitReport*>(memory_.data()); }

  PinnedBuffer memory_;
  mutable std::mutex mutex_;
  std::vector<std::vector<std::string>> parts_;  // by place
  size_t next_ = 0;
};

// The texts of all WaitReports that there are.
std::string WhyKernelsGaveUp();

}  // namespace annulus
