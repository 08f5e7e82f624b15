// A warp for each head of a token. Floors, elements moved per element of x: forward 2, backward 3.

#include "kernels/common/head_warps.cuh"
#include "kernels/delta_rule/delta_rule_cuda.h"

namespace annulus::kernels {
namespace {

template <typename T>
struct Forward {
  int64_t dim;
  float eps;
  StridedRows<const T> x;
  StridedRows<T> y;
  __device__ void operator()(int64_t row, int64_t item, int64_t head, int lane) const {
    const T* in = HeadAt(x, dim, row, item, head);
    T* out = HeadAt(y, dim, row, item, head);
    float squares = 0;
    for (int64_t i = lane; i < dim; i += 32) squares += ToFloat(in[i]) * ToFloat(in[i]);
    const float inverse = rsqrtf(WarpSum(squares) + eps);
    for (int64_t i = lane; i < dim; i += 32) out[i] = FromFloat<T>(ToFloat(in[i]) * inverse);
  }
};

// dx = r (dy - x r^2 sum(dy x))
template <typename T>
struct Backward {
  int64_t dim;
  float eps;
  StridedRows<const T> x, dy;
  StridedRows<T> dx;
  __device__ void operator()(int64_t row, int64_t item, int64_t head, int lane) const {
    const T* in = HeadAt(x, dim, row, item, head);
    const T* up = HeadAt(dy, dim, row, item, head);
    T* out = HeadAt(dx, dim, row, item, head);
    float squares = 0, dot = 0;
    for (int64_t i = lane; i < dim; i += 32) {
      squares += ToFloat(in[i]) * ToFloat(in[i]);
      dot += ToFloat(in[i]) * ToFloat(up[i]);
    }
    const float inverse = rsqrtf(WarpSum(squares) + eps), along = WarpSum(dot) * inverse * inverse;
    for (int64_t i = lane; i < dim; i += 32) {
      out[i] = FromFloat<T>(inverse * (ToFloat(up[i]) - along * ToFloat(in[i])));
    }
  }
};

}  // namespace

template <typename T>
cudaError_t CudaL2NormForward(const HeadsShape& shape, int64_t dim, StridedRows<const T> x, float eps,
                              StridedRows<T> y, cudaStream_t stream) {
  return LaunchHeadWarps(shape, Forward<T>{dim, eps, x, y}, stream);
}

template <typename T>
cudaError_t CudaL2NormBackward(const HeadsShape& shape, int64_t dim, StridedRows<const T> x, float eps,
                               StridedRows<const T> dy, StridedRows<T> dx, cudaStream_t stream) {
  return LaunchHeadWarps(shape, Backward<T>{dim, eps, x, dy, dx}, stream);
}

#define ANNULUS_INSTANTIATE(T)                                                                     \
  template cudaError_t CudaL2NormForward(const HeadsShape&, int64_t, StridedRows<const T>, float,  \
                                         StridedRows<T>, cudaStream_t);                            \
  template cudaError_t CudaL2NormBackward(const HeadsShape&, int64_t, StridedRows<const T>, float, \
                                          StridedRows<const T>, StridedRows<T>, cudaStream_t)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(__nv_bfloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
