#include "kernels/common/cuda_call.h"
#include "kernels/relu_squared/relu_squared_cuda.h"
#include "kernels/relu_squared/relu_squared_kernels.h"

namespace annulus::kernels {

template <typename T>
absl::Status ReluSquaredForward(CudaTag, Context& ctx, ConstTensorRef x, TensorRef h) {
  return CudaStatus("squared ReLU forward",
                    CudaReluSquaredForward(x.elements(), CudaData<T>(x), CudaData<T>(h), ctx.stream()));
}

template <typename T>
absl::Status ReluSquaredBackward(CudaTag, Context& ctx, ConstTensorRef x, ConstTensorRef dh, TensorRef dx) {
  return CudaStatus(
      "squared ReLU backward",
      CudaReluSquaredBackward(x.elements(), CudaData<T>(x), CudaData<T>(dh), CudaData<T>(dx), ctx.stream()));
}

template absl::Status ReluSquaredForward<float>(CudaTag, Context&, ConstTensorRef, TensorRef);
template absl::Status ReluSquaredForward<BFloat16>(CudaTag, Context&, ConstTensorRef, TensorRef);
template absl::Status ReluSquaredBackward<float>(CudaTag, Context&, ConstTensorRef, ConstTensorRef,
                                                 TensorRef);
template absl::Status ReluSquaredBackward<BFloat16>(CudaTag, Context&, ConstTensorRef, ConstTensorRef,
                                                    TensorRef);

}  // namespace annulus::kernels
