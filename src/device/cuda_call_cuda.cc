#include <cstdio>

#include "annulus/device/wait_reports.h"
#include "cuda_call.h"

namespace annulus {

std::string CurrentDevice() {
  Device device = {DeviceKind::kCuda, -1};
  cudaGetDevice(&device.index);
  return ToString(device);
}

std::string CudaFailure(absl::string_view call, cudaError_t error) {
  const std::string gave_up = WhyKernelsGaveUp();
  return absl::StrCat(call, ": ", cudaGetErrorName(error), " (", cudaGetErrorString(error), ") on ",
                      CurrentDevice(), gave_up.empty() ? "" : "; a kernel gave up: ", gave_up);
}

void LogCudaFailure(absl::string_view call, cudaError_t error) {
  if (error == cudaSuccess || error == cudaErrorCudartUnloading) return;
  std::fprintf(stderr, "annulus: %s\n", CudaFailure(call, error).c_str());
}

absl::Status CudaStatus(absl::string_view call, cudaError_t error) {
  if (error == cudaSuccess) return absl::OkStatus();
  cudaGetLastError();
  return absl::InternalError(CudaFailure(call, error));
}

absl::StatusOr<void*> DriverFunction(const char* name, unsigned version) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  ANNULUS_RETURN_IF_ERROR(
      CudaStatus("cudaGetDriverEntryPointByVersion",
                 cudaGetDriverEntryPointByVersion(name, &entry, version, cudaEnableDefault, &found)));
  if (found == cudaDriverEntryPointSuccess) return entry;
  return Invalid("the driver has no ", name, " of CUDA ", version / 1000, ".", version % 1000 / 10);
}

void MakeCurrent(Device device) {
  int index = -1;
  ANNULUS_CUDA_CHECK(cudaGetDevice(&index));
  if (index != device.index) ANNULUS_CUDA_CHECK(cudaSetDevice(device.index));
}

}  // namespace annulus
