#pragma once

// What the adapters from ops to CUDA launchers share: pointers of tensors as CUDA's types, and CudaStatus for
// errors of launches. Included by *_cuda.cc only.

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include "annulus/device/context.h"
#include "annulus/ops/heads.h"
#include "src/device/cuda_call.h"

namespace annulus::kernels {

namespace internal {
template <typename T>
struct CudaTypeOf {
  using Type = T;
};
template <>
struct CudaTypeOf<BFloat16> {
  using Type = __nv_bfloat16;
};
}  // namespace internal

// float -> float, BFloat16 -> __nv_bfloat16
template <typename T>
using CudaType = typename internal::CudaTypeOf<T>::Type;

// T must be the tensor's dtype.
template <typename T>
const CudaType<T>* CudaData(const ConstTensorRef& x) {
  return reinterpret_cast<const CudaType<T>*>(x.data<T>());
}
template <typename T>
CudaType<T>* CudaData(const TensorRef& x) {
  return reinterpret_cast<CudaType<T>*>(x.data<T>());
}
template <typename T>
const CudaType<T>* CudaData(const ConstHeadsRef& x) {
  return reinterpret_cast<const CudaType<T>*>(x.At<T>(0, 0));
}
template <typename T>
CudaType<T>* CudaData(const HeadsRef& x) {
  return reinterpret_cast<CudaType<T>*>(x.At<T>(0, 0));
}

}  // namespace annulus::kernels
