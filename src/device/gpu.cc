#include "annulus/device/gpu.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace annulus {
namespace {

// capability: 90 for 9.0
bool RunsOn(absl::string_view architecture, int capability) {
  const bool binary_alone = absl::ConsumeSuffix(&architecture, "-real");
  absl::ConsumeSuffix(&architecture, "-virtual");
  const bool exact = absl::ConsumeSuffix(&architecture, "a");
  int number = 0;
  if (!absl::SimpleAtoi(architecture, &number)) return false;
  if (exact) return number == capability;
  return capability >= number && (!binary_alone || capability / 10 == number / 10);
}

}  // namespace

absl::Status CheckArchitectures(absl::string_view architectures, int compute_major, int compute_minor) {
  constexpr int kOldest = 80, kHopper = 90;  // as src/cuda.cmake has it
  const int capability = 10 * compute_major + compute_minor;
  for (const absl::string_view architecture : absl::StrSplit(architectures, ',')) {
    if (RunsOn(architecture, capability)) return absl::OkStatus();
  }
  const std::string remedy = capability < kOldest
                                 ? "Annulus needs 8.0 or newer"
                                 : absl::StrCat("build with -DANNULUS_CUDA_ARCHITECTURES=", capability,
                                                capability == kHopper ? "a" : "", "-real");
  return absl::FailedPreconditionError(absl::StrCat("this program has kernels for ", architectures,
                                                    ", none for compute capability ", compute_major, ".",
                                                    compute_minor, ": ", remedy));
}

bool HaveHopperKernels(absl::string_view architectures, int compute_major, int compute_minor) {
  const std::vector<absl::string_view> all = absl::StrSplit(architectures, ',');
  return compute_major == 9 && compute_minor == 0 &&
         std::any_of(all.begin(), all.end(),
                     [](absl::string_view each) { return absl::StartsWith(each, "90a"); });
}

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
