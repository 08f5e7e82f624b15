#include "annulus/device/gpu.h"

#include "absl/strings/match.h"

namespace annulus {

// NVIDIA's datasheets. A slice of a GPU has a name of its own ("... MIG 1g.10gb") and so no peak here.
GpuPeak PeakOfGpu(absl::string_view name, int64_t memory_bytes) {
  constexpr int64_t kBetweenA100s = 60'000'000'000;  // they have 40 and 80 GB
  if (name == "NVIDIA H200") return {989.4, 4800};
  if (name == "NVIDIA H100 80GB HBM3") return {989.4, 3352};
  if (name == "NVIDIA H100 PCIe") return {756, 2039};
  const bool slice = absl::StrContains(name, "MIG");
  if (absl::StartsWith(name, "NVIDIA A100-SXM") && !slice)
    return {312, memory_bytes < kBetweenA100s ? 1555.0 : 2039.0};
  return {};
}

}  // namespace annulus
