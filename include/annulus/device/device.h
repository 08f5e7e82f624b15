#pragma once

// Where memory lives and kernels run.

#include <string>

namespace annulus {

enum class DeviceKind : unsigned char { kCpu, kCuda };

struct Device {
  DeviceKind kind = DeviceKind::kCpu;
  int index = 0;  // CUDA ordinal; 0 on CPUs
  friend bool operator==(const Device&, const Device&) = default;
};

std::string ToString(const Device& device);  // "cpu", "cuda:0"

}  // namespace annulus
