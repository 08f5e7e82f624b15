#pragma once

// The GPUs of this machine. Without a driver, or in a build without CUDA, there are none.

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "annulus/base/status.h"
#include "annulus/device/device.h"

namespace annulus {

struct GpuInfo {
  std::string name;      // "NVIDIA H200"
  std::string identity;  // equal for two devices exactly if they are the same one: its UUID
  int64_t memory_bytes = 0;
  int multiprocessors = 0;
  int compute_major = 0, compute_minor = 0;
  double bf16_tflops = 0;           // GpuPeak's
  double memory_gb_per_second = 0;  // GpuPeak's
};

// Peaks of the datasheets, by the name that the driver gives; 0: not known.
struct GpuPeak {
  double bf16_tflops = 0;  // dense
  double memory_gb_per_second = 0;
};
GpuPeak PeakOfGpu(absl::string_view name, int64_t memory_bytes);

// Devices that this process sees.
int GpuCount();
// Why there are none ("built without CUDA", the driver's message); empty if there are.
std::string WhyNoGpu();
absl::StatusOr<GpuInfo> DescribeGpu(int index);

// The architectures that this program's kernels were compiled for, as ANNULUS_CUDA_ARCHITECTURES with commas:
// "80-real,90a-real"; empty in a build without CUDA.
std::string GpuArchitectures();
// FailedPrecondition says what to build with if kernels for none of these architectures run on GPUs of this
// compute capability. Code of "80-real" does on 8.x, of "80" and "80-virtual", which the driver compiles, on
// all that are as new, of "90a" on 9.0 alone.
absl::Status CheckArchitectures(absl::string_view architectures, int compute_major, int compute_minor);
// Whether kernels for Hopper, which only "90a" compiles, are among them and run on such a GPU; and whether
// those of this program run on that device.
bool HaveHopperKernels(absl::string_view architectures, int compute_major, int compute_minor);
bool RunsHopperKernels(Device device);

// Whether the memory of `to` can be mapped where kernels of `from` run; of this process's devices.
absl::StatusOr<bool> GpuMaps(int from, int to);

// Makes `index` the device of the calling thread; NotFound names how many there are, FailedPrecondition that
// this program has no kernels for it. Every thread that touches CUDA calls this first: else CUDA takes memory
// for that thread on device 0. What allocates on a device (Buffer, Stream, ...) makes it the thread's as
// well.
absl::Status UseGpu(int index);

struct GpuMemory {
  int64_t free_bytes = 0, total_bytes = 0;
};
absl::StatusOr<GpuMemory> MemoryOfGpu();  // of the thread's device, all processes counted

// "CUDA 13.0, driver 13.0"; "none" in a build without CUDA.
std::string CudaVersion();

}  // namespace annulus
