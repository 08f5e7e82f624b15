#include "annulus/device/gpu.h"

namespace annulus {
namespace {

absl::Status NoGpu(int index) {
  return absl::NotFoundError(absl::StrCat("cuda:", index, ": no GPU: ", WhyNoGpu()));
}

}  // namespace

int GpuCount() { return 0; }
std::string WhyNoGpu() { return "built without CUDA"; }
absl::StatusOr<GpuInfo> DescribeGpu(int index) { return NoGpu(index); }
std::string GpuArchitectures() { return ""; }
bool RunsHopperKernels(Device) { return false; }
absl::StatusOr<bool> GpuMaps(int from, int) { return NoGpu(from); }
absl::Status UseGpu(int index) { return NoGpu(index); }
absl::StatusOr<GpuMemory> MemoryOfGpu() { return absl::NotFoundError(absl::StrCat("no GPU: ", WhyNoGpu())); }
std::string CudaVersion() { return "none"; }

}  // namespace annulus
