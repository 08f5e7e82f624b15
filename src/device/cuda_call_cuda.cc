#include <cstdio>

#include "cuda_call.h"

namespace annulus {

std::string CurrentDevice() {
  Device device = {DeviceKind::kCuda, -1};
  cudaGetDevice(&device.index);
  return ToString(device);
}

std::string CudaFailure(const char* call, cudaError_t error) {
  return absl::StrCat(call, ": ", cudaGetErrorName(error), " (", cudaGetErrorString(error), ") on ",
                      CurrentDevice());
}

void LogCudaFailure(const char* call, cudaError_t error) {
  if (error == cudaSuccess || error == cudaErrorCudartUnloading) return;
  std::fprintf(stderr, "annulus: %s\n", CudaFailure(call, error).c_str());
}

absl::Status CudaStatus(const char* call, cudaError_t error) {
  if (error == cudaSuccess) return absl::OkStatus();
  cudaGetLastError();
  return absl::InternalError(CudaFailure(call, error));
}

void MakeCurrent(Device device) {
  int index = -1;
  ANNULUS_CUDA_CHECK(cudaGetDevice(&index));
  if (index != device.index) ANNULUS_CUDA_CHECK(cudaSetDevice(device.index));
}

}  // namespace annulus
