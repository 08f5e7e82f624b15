#pragma once

// Failures of CUDA calls with the call, the library's message and the device. Included by *_cuda.cc only.

#include <cuda_runtime_api.h>

#include <string>

#include "absl/strings/string_view.h"
#include "annulus/base/check.h"
#include "annulus/base/status.h"
#include "annulus/device/device.h"

namespace annulus {

std::string CurrentDevice();  // "cuda:0", the calling thread's

// "cudaMalloc: cudaErrorInvalidValue (invalid argument) on cuda:0", and what kernels gave up waiting for
std::string CudaFailure(absl::string_view call, cudaError_t error);

// For destructors: the failure on stderr. Silent while the process ends and CUDA is gone already.
void LogCudaFailure(absl::string_view call, cudaError_t error);

// A failure as absl::Internal. Failures are forgotten by CUDA, so that later checks do not find them again.
absl::Status CudaStatus(absl::string_view call, cudaError_t error);

// A driver function in the form that `version` of the driver API gave it. The program does not link the
// driver, so that it starts on machines without one.
absl::StatusOr<void*> DriverFunction(const char* name, unsigned version);

// Makes `device` the calling thread's.
void MakeCurrent(Device device);

}  // namespace annulus

#define ANNULUS_CUDA_CHECK(call)                                                                 \
  do {                                                                                           \
    const cudaError_t annulus_error = (call);                                                    \
    ANNULUS_CHECK(annulus_error == cudaSuccess) << ::annulus::CudaFailure(#call, annulus_error); \
  } while (false)
