// Floors, bytes per element: cast 6 (f32 and bf16), add f32 += bf16 10, scale 2 sizes, sum of squares 1 size.

#include "kernels/common/rows.cuh"
#include "kernels/elementwise/elementwise_cuda.h"

namespace annulus::kernels {
namespace {

template <typename From, typename To>
inline constexpr int kPairVector =
    kVectorElements<From> < kVectorElements<To> ? kVectorElements<From> : kVectorElements<To>;

// Row r of [rows, batch] flattened.
template <typename T>
__device__ T* RowOf(const StridedRows<T>& x, int64_t row, int batch) {
  if (batch == 1) return x.data + row * x.row_stride;
  const uint32_t r = static_cast<uint32_t>(row), b = static_cast<uint32_t>(batch);
  return x.data + (r / b) * x.row_stride + (r % b) * x.batch_stride;
}

template <typename From, typename To>
struct CastOp {
  StridedRows<const From> x;
  StridedRows<To> y;
  int batch;
  template <int N>
  using State = Pack<From, N>;
  template <int N>
  __device__ State<N> Load(int64_t row, int64_t column) const {
    return LoadPack<N>(RowOf(x, row, batch) + column);
  }
  template <int N>
  __device__ void Store(int64_t row, int64_t column, const State<N>& state) const {
    float value[N];
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = state[i];
    StorePack<N>(PackOf<To>(value), RowOf(y, row, batch) + column);
  }
};

template <typename From, typename To>
struct AddOp {
  StridedRows<const From> x;
  StridedRows<To> y;
  int batch;
  template <int N>
  struct State {
    Pack<From, N> x;
    Pack<To, N> y;
  };
  template <int N>
  __device__ State<N> Load(int64_t row, int64_t column) const {
    const To* sum = RowOf(y, row, batch) + column;
    return {LoadPack<N>(RowOf(x, row, batch) + column), LoadPack<N>(sum)};
  }
  template <int N>
  __device__ void Store(int64_t row, int64_t column, const State<N>& state) const {
    float value[N];
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = state.y[i] + state.x[i];
    StorePack<N>(PackOf<To>(value), RowOf(y, row, batch) + column);
  }
};

template <typename T>
struct RepeatOp {
  const T* x;
  T* y;
  int64_t columns;
  template <int N>
  using State = Pack<T, N>;
  template <int N>
  __device__ State<N> Load(int64_t, int64_t column) const {
    return LoadPack<N>(x + column);
  }
  template <int N>
  __device__ void Store(int64_t row, int64_t column, const State<N>& state) const {
    StorePack<N>(state, y + row * columns + column);
  }
};

template <typename T>
struct ScaleOp {
  T* x;
  float factor;
  template <int N>
  using State = Pack<T, N>;
  template <int N>
  __device__ State<N> Load(int64_t, int64_t column) const {
    return LoadPack<N>(static_cast<const T*>(x + column));
  }
  template <int N>
  __device__ void Store(int64_t, int64_t column, const State<N>& state) const {
    float value[N];
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = factor * state[i];
    StorePack<N>(PackOf<T>(value), x + column);
  }
};

template <template <typename, typename> class Op, typename From, typename To>
cudaError_t LaunchPair(const RowsShape& shape, StridedRows<const From> x, StridedRows<To> y,
                       cudaStream_t stream) {
  constexpr int kN = kPairVector<From, To>;
  const bool one_row = shape.rows * shape.batch == 1;
  const bool fit = Aligned(x.data) && Aligned(y.data) &&
                   (one_row || (shape.columns % kN == 0 && x.row_stride % kVectorElements<From> == 0 &&
                                y.row_stride % kVectorElements<To> == 0 &&
                                (shape.batch == 1 || (x.batch_stride % kVectorElements<From> == 0 &&
                                                      y.batch_stride % kVectorElements<To> == 0))));
  if (shape.rows * shape.batch > UINT32_MAX) return cudaErrorInvalidValue;
  const Op<From, To> op{x, y, static_cast<int>(shape.batch)};
  return LaunchRows<kN, 4>(shape.rows * shape.batch, shape.columns, fit, op, stream);
}

constexpr int kSumThreads = 512;

__device__ double BlockSum(double x) {
  __shared__ double warp_sum[kSumThreads / 32];
  x = WarpSum(x);
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kSumThreads / 32; ++w) sum += warp_sum[w];
  return sum;
}

template <typename T, int N>
__global__ void __launch_bounds__(kSumThreads)
    PartialSquaresKernel(const T* __restrict__ x, int64_t elements, double* __restrict__ partial) {
  constexpr int kUnroll = 4;
  const int64_t vectors = elements / N;
  const int64_t threads = int64_t{gridDim.x} * kSumThreads;
  const int64_t thread = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  double sum = 0;
  for (int64_t first = thread; first < vectors; first += threads * kUnroll) {
    Pack<T, N> pack[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t vector = first + u * threads;
      if (vector < vectors) pack[u] = LoadPack<N>(x + vector * N);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float squares = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) squares += pack[u][i] * pack[u][i];
      sum += squares;
    }
  }
  const int64_t tail = vectors * N + thread;
  if (tail < elements) sum += static_cast<double>(ToFloat(x[tail])) * ToFloat(x[tail]);
  sum = BlockSum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kSumThreads)
    AddPartialsKernel(const double* partial, int count, double* total) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kSumThreads) sum += partial[i];
  sum = BlockSum(sum);
  if (threadIdx.x == 0) *total += sum;
}

__global__ void ClipFactorKernel(const double* stats, int64_t count, double max_norm, double* factor) {
  bool finite = true;
  for (int64_t i = threadIdx.x; i < count; i += 32) finite &= isfinite(stats[i]);
  finite = __all_sync(0xffffffffu, finite);
  if (threadIdx.x != 0) return;
  const double norm = sqrt(stats[0]);
  const double clipped = max_norm == 0 || norm <= max_norm ? 1.0 : max_norm / norm;
  *factor = finite ? clipped : nan("");
}

}  // namespace

template <typename From, typename To>
cudaError_t CudaCast(const From* x, int64_t elements, To* y, cudaStream_t stream) {
  return CudaCastRows<From, To>({.rows = 1, .columns = elements}, {x}, {y}, stream);
}
template <typename From, typename To>
cudaError_t CudaAdd(const From* x, int64_t elements, To* y, cudaStream_t stream) {
  return CudaAddRows<From, To>({.rows = 1, .columns = elements}, {x}, {y}, stream);
}
template <typename From, typename To>
cudaError_t CudaCastRows(const RowsShape& shape, StridedRows<const From> x, StridedRows<To> y,
                         cudaStream_t stream) {
  return LaunchPair<CastOp, From, To>(shape, x, y, stream);
}
template <typename From, typename To>
cudaError_t CudaAddRows(const RowsShape& shape, StridedRows<const From> x, StridedRows<To> y,
                        cudaStream_t stream) {
  return LaunchPair<AddOp, From, To>(shape, x, y, stream);
}

template <typename T>
cudaError_t CudaScale(double factor, int64_t elements, T* x, cudaStream_t stream) {
  const ScaleOp<T> op{x, static_cast<float>(factor)};
  return LaunchRows<kVectorElements<T>, 4>(1, elements, Aligned(x), op, stream);
}

template <typename T>
cudaError_t CudaRepeatRow(const T* x, int64_t rows, int64_t columns, T* y, cudaStream_t stream) {
  constexpr int kN = kVectorElements<T>;
  const bool fit = columns % kN == 0 && Aligned(x) && Aligned(y);
  return LaunchRows<kN, 2>(rows, columns, fit, RepeatOp<T>{x, y, columns}, stream);
}

cudaError_t CudaZero(void* x, int64_t bytes, cudaStream_t stream) {
  return cudaMemsetAsync(x, 0, static_cast<size_t>(bytes), stream);
}

template <typename T>
cudaError_t CudaSumOfSquares(const T* x, int64_t elements, double* scratch, double* sum,
                             cudaStream_t stream) {
  // At most kSumOfSquaresScratch CTAs (7.8 a 132-SM device): the order of the sum is the same on every
  // device.
  const int64_t per_block = int64_t{kSumThreads} * kVectorElements<T> * 4;
  const int64_t blocks = std::min(kSumOfSquaresScratch, std::max<int64_t>(1, CeilDiv(elements, per_block)));
  const auto grid = static_cast<uint32_t>(blocks);
  if (Aligned(x)) {
    PartialSquaresKernel<T, kVectorElements<T>><<<grid, kSumThreads, 0, stream>>>(x, elements, scratch);
  } else {
    PartialSquaresKernel<T, 1><<<grid, kSumThreads, 0, stream>>>(x, elements, scratch);
  }
  AddPartialsKernel<<<1, kSumThreads, 0, stream>>>(scratch, static_cast<int>(blocks), sum);
  return cudaGetLastError();
}

cudaError_t CudaClipFactor(const double* stats, int64_t count, double max_norm, double* factor,
                           cudaStream_t stream) {
  ClipFactorKernel<<<1, 32, 0, stream>>>(stats, count, max_norm, factor);
  return cudaGetLastError();
}

#define ANNULUS_INSTANTIATE(From, To)                                                                     \
  template cudaError_t CudaCast<From, To>(const From*, int64_t, To*, cudaStream_t);                       \
  template cudaError_t CudaAdd<From, To>(const From*, int64_t, To*, cudaStream_t);                        \
  template cudaError_t CudaCastRows<From, To>(const RowsShape&, StridedRows<const From>, StridedRows<To>, \
                                              cudaStream_t);                                              \
  template cudaError_t CudaAddRows<From, To>(const RowsShape&, StridedRows<const From>, StridedRows<To>,  \
                                             cudaStream_t)
ANNULUS_INSTANTIATE(float, float);
ANNULUS_INSTANTIATE(float, __nv_bfloat16);
ANNULUS_INSTANTIATE(__nv_bfloat16, float);
ANNULUS_INSTANTIATE(__nv_bfloat16, __nv_bfloat16);
#undef ANNULUS_INSTANTIATE

template cudaError_t CudaScale<float>(double, int64_t, float*, cudaStream_t);
template cudaError_t CudaScale<__nv_bfloat16>(double, int64_t, __nv_bfloat16*, cudaStream_t);
template cudaError_t CudaRepeatRow<float>(const float*, int64_t, int64_t, float*, cudaStream_t);
template cudaError_t CudaRepeatRow<__nv_bfloat16>(const __nv_bfloat16*, int64_t, int64_t, __nv_bfloat16*,
                                                  cudaStream_t);
template cudaError_t CudaSumOfSquares<float>(const float*, int64_t, double*, double*, cudaStream_t);
template cudaError_t CudaSumOfSquares<__nv_bfloat16>(const __nv_bfloat16*, int64_t, double*, double*,
                                                     cudaStream_t);

}  // namespace annulus::kernels
