// Floor, bytes per element: the sizes of From and To, To twice where it is added to.

#include "kernels/columns/columns_cuda.h"
#include "kernels/common/rows.cuh"

namespace annulus::kernels {
namespace {

template <typename From, typename To>
inline constexpr int kMoveVector =
    kVectorElements<From> < kVectorElements<To> ? kVectorElements<From> : kVectorElements<To>;

// A vector lies in one run: all runs begin and end on vectors.
template <typename From, typename To, ColumnWrite kWrite>
struct MoveOp {
  const From* x;
  To* y;
  int64_t x_columns, y_columns;
  ColumnRuns runs;

  template <int N>
  struct State {
    Pack<From, N> x;
    Pack<To, N> y;
    To* to;
  };
  template <int N>
  __device__ State<N> Load(int64_t row, int64_t column) const {
    int run = 0;
#pragma unroll
    for (int r = 1; r < kMaxColumnRuns; ++r) run += r < runs.count && column >= runs.begin[r];
    const int64_t offset = column - runs.begin[run];
    State<N> state;
    state.x = LoadPack<N>(x + row * x_columns + runs.from[run] + offset);
    state.to = y + row * y_columns + runs.to[run] + offset;
    if constexpr (kWrite == ColumnWrite::kAdd) state.y = LoadPack<N>(static_cast<const To*>(state.to));
    return state;
  }
  template <int N>
  __device__ void Store(int64_t, int64_t, const State<N>& state) const {
    float value[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      value[i] = state.x[i];
      if constexpr (kWrite == ColumnWrite::kAdd) value[i] += state.y[i];
    }
    StorePack<N>(PackOf<To>(value), state.to);
  }
};

template <ColumnWrite kWrite, typename From, typename To>
cudaError_t Launch(const CudaMoveColumnsArgs<From, To>& args, cudaStream_t stream) {
  constexpr int kN = kMoveVector<From, To>;
  bool fit = Aligned(args.x) && Aligned(args.y) && args.x_columns % kN == 0 && args.y_columns % kN == 0;
  for (int r = 0; r < args.runs.count; ++r) {
    fit = fit && args.runs.begin[r] % kN == 0 && args.runs.from[r] % kN == 0 && args.runs.to[r] % kN == 0;
  }
  fit = fit && args.runs.columns % kN == 0;
  const MoveOp<From, To, kWrite> op{args.x, args.y, args.x_columns, args.y_columns, args.runs};
  return LaunchRows<kN, 2>(args.rows, args.runs.columns, fit, op, stream);
}

}  // namespace

template <typename From, typename To>
cudaError_t CudaMoveColumns(const CudaMoveColumnsArgs<From, To>& args, cudaStream_t stream) {
  return args.write == ColumnWrite::kAdd ? Launch<ColumnWrite::kAdd>(args, stream)
                                         : Launch<ColumnWrite::kOverwrite>(args, stream);
}

template cudaError_t CudaMoveColumns(const CudaMoveColumnsArgs<float, float>&, cudaStream_t);
template cudaError_t CudaMoveColumns(const CudaMoveColumnsArgs<float, __nv_bfloat16>&, cudaStream_t);
template cudaError_t CudaMoveColumns(const CudaMoveColumnsArgs<__nv_bfloat16, float>&, cudaStream_t);
template cudaError_t CudaMoveColumns(const CudaMoveColumnsArgs<__nv_bfloat16, __nv_bfloat16>&, cudaStream_t);

}  // namespace annulus::kernels
