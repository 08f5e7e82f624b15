#include "absl/strings/escaping.h"
#include "annulus/device/gpu.h"
#include "cuda_call.h"

namespace annulus {
namespace {

struct Count {
  int gpus = 0;
  std::string why_none;
};

Count CountGpus() {
  Count count;
  const cudaError_t error = cudaGetDeviceCount(&count.gpus);
  if (error == cudaSuccess && count.gpus > 0) return count;
  cudaGetLastError();
  count.gpus = 0;
  int driver = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0)
    count.why_none = "no NVIDIA driver";  // CUDA calls it too old
  else
    count.why_none = error == cudaSuccess ? "the driver finds none" : cudaGetErrorString(error);
  return count;
}

absl::Status CheckIndex(int index) {
  const Count count = CountGpus();
  if (count.gpus == 0) return absl::NotFoundError(absl::StrCat("cuda:", index, ": no GPU: ", count.why_none));
  if (index >= 0 && index < count.gpus) return absl::OkStatus();
  return absl::NotFoundError(absl::StrCat("cuda:", index, ": this process sees ", count.gpus,
                                          count.gpus == 1 ? " GPU, cuda:0" : " GPUs, cuda:0 and up"));
}

absl::StatusOr<int> Attribute(cudaDeviceAttr attribute, int index) {
  int value = 0;
  ANNULUS_RETURN_IF_ERROR(
      CudaStatus("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, attribute, index)));
  return value;
}

std::string Version(int version) { return absl::StrCat(version / 1000, ".", version % 1000 / 10); }

}  // namespace

int GpuCount() { return CountGpus().gpus; }

std::string WhyNoGpu() { return CountGpus().why_none; }

absl::StatusOr<GpuInfo> DescribeGpu(int index) {
  ANNULUS_RETURN_IF_ERROR(CheckIndex(index));
  cudaDeviceProp properties{};
  ANNULUS_RETURN_IF_ERROR(CudaStatus("cudaGetDeviceProperties", cudaGetDeviceProperties(&properties, index)));
  GpuInfo info;
  info.name = properties.name;
  info.identity =
      absl::BytesToHexString(absl::string_view(properties.uuid.bytes, sizeof(properties.uuid.bytes)));
  info.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  info.multiprocessors = properties.multiProcessorCount;
  info.compute_major = properties.major;
  info.compute_minor = properties.minor;
  const GpuPeak peak = PeakOfGpu(info.name, info.memory_bytes);
  info.bf16_tflops = peak.bf16_tflops;
  info.memory_gb_per_second = peak.memory_gb_per_second;
  return info;
}

std::string GpuArchitectures() { return ANNULUS_CUDA_ARCHITECTURES; }

bool RunsHopperKernels(Device device) {
  if (device.kind != DeviceKind::kCuda) return false;
  const absl::StatusOr<int> major = Attribute(cudaDevAttrComputeCapabilityMajor, device.index),
                            minor = Attribute(cudaDevAttrComputeCapabilityMinor, device.index);
  return major.ok() && minor.ok() && HaveHopperKernels(ANNULUS_CUDA_ARCHITECTURES, *major, *minor);
}

absl::StatusOr<bool> GpuMaps(int from, int to) {
  for (const int index : {from, to}) ANNULUS_RETURN_IF_ERROR(CheckIndex(index));
  if (from == to) return true;
  int can = 0;
  ANNULUS_RETURN_IF_ERROR(CudaStatus("cudaDeviceCanAccessPeer", cudaDeviceCanAccessPeer(&can, from, to)));
  return can != 0;
}

absl::Status UseGpu(int index) {
  ANNULUS_RETURN_IF_ERROR(CheckIndex(index));
  ANNULUS_ASSIGN_OR_RETURN(const int major, Attribute(cudaDevAttrComputeCapabilityMajor, index));
  ANNULUS_ASSIGN_OR_RETURN(const int minor, Attribute(cudaDevAttrComputeCapabilityMinor, index));
  ANNULUS_RETURN_IF_ERROR(
      Prefixed(CheckArchitectures(GpuArchitectures(), major, minor), absl::StrCat("cuda:", index, ": ")));
  return CudaStatus("cudaSetDevice", cudaSetDevice(index));
}

absl::StatusOr<GpuMemory> MemoryOfGpu() {
  const Count count = CountGpus();
  if (count.gpus == 0) return absl::NotFoundError(absl::StrCat("no GPU: ", count.why_none));
  size_t free_bytes = 0, total_bytes = 0;
  ANNULUS_RETURN_IF_ERROR(CudaStatus("cudaMemGetInfo", cudaMemGetInfo(&free_bytes, &total_bytes)));
  return GpuMemory{static_cast<int64_t>(free_bytes), static_cast<int64_t>(total_bytes)};
}

std::string CudaVersion() {
  int runtime = 0, driver = 0;
  const bool known =
      cudaRuntimeGetVersion(&runtime) == cudaSuccess && cudaDriverGetVersion(&driver) == cudaSuccess;
  if (!known) cudaGetLastError();
  return absl::StrCat("CUDA ", Version(runtime), ", ",
                      driver == 0 ? "no driver" : absl::StrCat("driver ", Version(driver)));
}

}  // namespace annulus
