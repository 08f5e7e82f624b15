#include "kernels/common/cuda_call.h"
#include "kernels/swiglu/swiglu_cuda.h"
#include "kernels/swiglu/swiglu_kernels.h"

namespace annulus::kernels {

template <typename T>
absl::Status SwigluForward(CudaTag, Context& ctx, ConstTensorRef gate_up, TensorRef h) {
  return CudaStatus("swiglu forward", CudaSwigluForward(h.dim(0), h.dim(1), CudaData<T>(gate_up),
                                                        CudaData<T>(h), ctx.stream()));
}

template <typename T>
absl::Status SwigluBackward(CudaTag, Context& ctx, ConstTensorRef gate_up, ConstTensorRef dh,
                            TensorRef dgate_up) {
  return CudaStatus("swiglu backward",
                    CudaSwigluBackward(dh.dim(0), dh.dim(1), CudaData<T>(gate_up), CudaData<T>(dh),
                                       CudaData<T>(dgate_up), ctx.stream()));
}

template absl::Status SwigluForward<float>(CudaTag, Context&, ConstTensorRef, TensorRef);
template absl::Status SwigluForward<BFloat16>(CudaTag, Context&, ConstTensorRef, TensorRef);
template absl::Status SwigluBackward<float>(CudaTag, Context&, ConstTensorRef, ConstTensorRef, TensorRef);
template absl::Status SwigluBackward<BFloat16>(CudaTag, Context&, ConstTensorRef, ConstTensorRef, TensorRef);

}  // namespace annulus::kernels
