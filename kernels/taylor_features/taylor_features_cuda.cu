// A warp for each head of a token. Floors, elements moved per head: forward d + (1 + d + d^2), backward the
// same and d.

#include "kernels/common/head_warps.cuh"
#include "kernels/taylor_features/taylor_features_cuda.h"

namespace annulus::kernels {
namespace {

// Factors of the terms of first and second order.
struct Factors {
  explicit Factors(int64_t dim)
      : first(static_cast<float>(1 / sqrt(sqrt(static_cast<double>(dim))))),
        second(static_cast<float>(1 / sqrt(2.0 * static_cast<double>(dim)))) {}
  float first, second;
};

template <typename T>
struct TaylorForward {
  int64_t dim;
  Factors factors;
  StridedRows<const T> x;
  StridedRows<T> y;
  __device__ void operator()(int64_t row, int64_t item, int64_t head, int lane) const {
    const int d = static_cast<int>(dim), features = 1 + d + d * d;
    const T* in = HeadAt(x, dim, row, item, head);
    T* out = HeadAt(y, features, row, item, head);
    for (int i = lane; i < features; i += 32) {
      float value = 1;
      if (i > d) {
        const int product = i - 1 - d;
        value = ToFloat(in[product / d]) * factors.second * ToFloat(in[product % d]);
      } else if (i > 0) {
        value = ToFloat(in[i - 1]) * factors.first;
      }
      out[i] = FromFloat<T>(value);
    }
  }
};

// The term x_i x_j gives x_j to dx_i and x_i to dx_j.
template <typename T>
struct TaylorBackward {
  int64_t dim;
  Factors factors;
  StridedRows<const T> x, dy;
  StridedRows<T> dx;
  __device__ void operator()(int64_t row, int64_t item, int64_t head, int lane) const {
    const int d = static_cast<int>(dim), features = 1 + d + d * d;
    const T* in = HeadAt(x, dim, row, item, head);
    const T* up = HeadAt(dy, features, row, item, head);
    T* out = HeadAt(dx, dim, row, item, head);
    const T* products = up + 1 + d;
    for (int i = lane; i < d; i += 32) {
      float sum = 0;
      for (int j = 0; j < d; ++j) {
        sum += (ToFloat(products[i * d + j]) + ToFloat(products[j * d + i])) * ToFloat(in[j]);
      }
      out[i] = FromFloat<T>(ToFloat(up[1 + i]) * factors.first + sum * factors.second);
    }
  }
};

template <typename T>
struct Normalise {
  int64_t dim;
  float eps;
  StridedRows<const T> num;
  StridedRows<T> o;
  __device__ void operator()(int64_t row, int64_t item, int64_t head, int lane) const {
    const T* in = HeadAt(num, dim + 1, row, item, head);
    T* out = HeadAt(o, dim, row, item, head);
    const float inverse = 1.0f / (ToFloat(in[dim]) + eps);
    for (int64_t i = lane; i < dim; i += 32) out[i] = FromFloat<T>(ToFloat(in[i]) * inverse);
  }
};

template <typename T>
struct NormaliseGradient {
  int64_t dim;
  float eps;
  StridedRows<const T> num, dout;
  StridedRows<T> dnum;
  __device__ void operator()(int64_t row, int64_t item, int64_t head, int lane) const {
    const T* in = HeadAt(num, dim + 1, row, item, head);
    const T* up = HeadAt(dout, dim, row, item, head);
    T* out = HeadAt(dnum, dim + 1, row, item, head);
    const float inverse = 1.0f / (ToFloat(in[dim]) + eps);
    float dot = 0;
    for (int64_t i = lane; i < dim; i += 32) {
      dot += ToFloat(up[i]) * ToFloat(in[i]);
      out[i] = FromFloat<T>(ToFloat(up[i]) * inverse);
    }
    dot = WarpSum(dot);
    if (lane == 0) out[dim] = FromFloat<T>(-dot * inverse * inverse);
  }
};

template <typename T>
struct CopyHeads {
  int64_t x_dim, y_dim;
  StridedRows<const T> x;
  StridedRows<T> y;
  __device__ void operator()(int64_t row, int64_t item, int64_t head, int lane) const {
    const T* in = HeadAt(x, x_dim, row, item, head);
    T* out = HeadAt(y, y_dim, row, item, head);
    for (int64_t i = lane; i < y_dim; i += 32) out[i] = i < x_dim ? in[i] : FromFloat<T>(1.0f);
  }
};

}  // namespace

template <typename T>
cudaError_t CudaTaylorForward(const HeadsShape& shape, int64_t dim, StridedRows<const T> x, StridedRows<T> y,
                              cudaStream_t stream) {
  return LaunchHeadWarps(shape, TaylorForward<T>{dim, Factors(dim), x, y}, stream);
}

template <typename T>
cudaError_t CudaTaylorBackward(const HeadsShape& shape, int64_t dim, StridedRows<const T> x,
                               StridedRows<const T> dy, StridedRows<T> dx, cudaStream_t stream) {
  return LaunchHeadWarps(shape, TaylorBackward<T>{dim, Factors(dim), x, dy, dx}, stream);
}

template <typename T>
cudaError_t CudaNormaliseForward(const HeadsShape& shape, int64_t dim, StridedRows<const T> num, float eps,
                                 StridedRows<T> o, cudaStream_t stream) {
  return LaunchHeadWarps(shape, Normalise<T>{dim, eps, num, o}, stream);
}

template <typename T>
cudaError_t CudaNormaliseBackward(const HeadsShape& shape, int64_t dim, StridedRows<const T> num, float eps,
                                  StridedRows<const T> dout, StridedRows<T> dnum, cudaStream_t stream) {
  return LaunchHeadWarps(shape, NormaliseGradient<T>{dim, eps, num, dout, dnum}, stream);
}

template <typename T>
cudaError_t CudaCopyHeads(const HeadsShape& shape, int64_t x_dim, StridedRows<const T> x, int64_t y_dim,
                          StridedRows<T> y, cudaStream_t stream) {
  return LaunchHeadWarps(shape, CopyHeads<T>{x_dim, y_dim, x, y}, stream);
}

#define ANNULUS_INSTANTIATE(T)                                                                           \
  template cudaError_t CudaTaylorForward<T>(const HeadsShape&, int64_t, StridedRows<const T>,            \
                                            StridedRows<T>, cudaStream_t);                               \
  template cudaError_t CudaTaylorBackward<T>(const HeadsShape&, int64_t, StridedRows<const T>,           \
                                             StridedRows<const T>, StridedRows<T>, cudaStream_t);        \
  template cudaError_t CudaNormaliseForward<T>(const HeadsShape&, int64_t, StridedRows<const T>, float,  \
                                               StridedRows<T>, cudaStream_t);                            \
  template cudaError_t CudaNormaliseBackward<T>(const HeadsShape&, int64_t, StridedRows<const T>, float, \
                                                StridedRows<const T>, StridedRows<T>, cudaStream_t);     \
  template cudaError_t CudaCopyHeads<T>(const HeadsShape&, int64_t, StridedRows<const T>, int64_t,       \
                                        StridedRows<T>, cudaStream_t)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(__nv_bfloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
