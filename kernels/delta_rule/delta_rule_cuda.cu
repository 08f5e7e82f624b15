// Forward and summaries of the gated delta rule.
//
// Floor: q, k, v, o and the states moved once, which for 8192 tokens of 16 heads of 128 takes H200 63 us. It
// takes 3.6 ms: the scan's chain of chunks 1.3, outputs 0.95, triangular solves 0.8, B and P 0.45. What
// limits the products are their operands, computed and read one by one, not tensor cores; what limits solves
// is that a thread takes the rows of a column one after the other.

#include "kernels/delta_rule/delta_slice.cuh"

namespace annulus::kernels {
namespace {

struct Nothing {};

// B: k_t . k_s decayed, below the diagonal.
template <typename T>
struct Gram : DeltaBlock<T> {
  __device__ Gram(const DeltaSlice<T>& slice, int64_t index, Nothing) : DeltaBlock<T>(slice, index) {
    this->k = slice.rule.state;
  }
  __device__ float Left(int64_t i, int64_t l) const { return this->K(i, l); }
  __device__ float Right(int64_t l, int64_t j) const { return this->K(j, l); }
  __device__ void Store(int64_t i, int64_t j, float sum) const {
    this->Square(this->slice.gram, i, j) = j < i ? sum * this->at.Decay(i, j) : 0;
  }
};

// P: q_t . k_s decayed, up to the diagonal.
template <typename T>
struct Scores : DeltaBlock<T> {
  __device__ Scores(const DeltaSlice<T>& slice, int64_t index, Nothing) : DeltaBlock<T>(slice, index) {
    this->k = slice.rule.state;
  }
  __device__ float Left(int64_t i, int64_t l) const { return this->Q(i, l); }
  __device__ float Right(int64_t l, int64_t j) const { return this->K(j, l); }
  __device__ void Store(int64_t i, int64_t j, float sum) const {
    const float decay = this->at.Decay(i, j);
    this->Square(this->slice.scores, i, j) = decay == 0 ? 0 : sum * decay;
  }
};

template <typename T>
struct Output : DeltaBlock<T> {
  struct Extra {
    const float* states;
    StridedRows<T> o;
  };
  Extra extra;
  __device__ Output(const DeltaSlice<T>& slice, int64_t index, const Extra& e)
      : DeltaBlock<T>(slice, index), extra(e) {
    this->n = slice.rule.dim;
    this->k = this->m + slice.rule.state;
  }
  __device__ float Left(int64_t i, int64_t l) const {
    if (l < this->m) return this->Square(this->slice.scores, i, l);
    return this->FromStart(i) * this->Q(i, l - this->m);
  }
  __device__ float Right(int64_t l, int64_t j) const {
    if (l < this->m) return this->OfValues(this->slice.delta, l, j);
    return this->State(extra.states, l - this->m, j);
  }
  __device__ void Store(int64_t i, int64_t j, float sum) const {
    this->at.At(extra.o, i, this->at.head, this->n)[j] = FromFloat<T>(sum);
  }
};

template <typename T>
struct OutputToDelta : DeltaBlock<T> {
  StridedRows<const T> dout;
  __device__ OutputToDelta(const DeltaSlice<T>& slice, int64_t index, const StridedRows<const T>& d)
      : DeltaBlock<T>(slice, index), dout(d) {
    this->n = slice.rule.dim;
  }
  __device__ float Left(int64_t i, int64_t l) const { return this->Square(this->slice.scores, l, i); }
  __device__ float Right(int64_t l, int64_t j) const { return this->at.Of(dout, l, j); }
  __device__ void Store(int64_t i, int64_t j, float sum) const {
    this->OfValues(this->slice.ddelta, i, j) = sum;
  }
};

// A thread solves one column of (I + A) x = right side, or of its transpose, A = beta B.
//   shared memory: B [rows, rows], x [rows, kSolveColumns]
constexpr int kSolveColumns = 64;
enum class Solve { kKeys, kValues, kResidual, kTransposed };

template <typename T, Solve kSolve>
__device__ float RightSide(const DeltaBlock<T>& block, int64_t t, int64_t j) {
  if (kSolve == Solve::kKeys) return block.Beta(t) * block.FromStart(t) * block.K(t, j);
  if (kSolve == Solve::kValues) return block.Beta(t) * block.V(t, j);
  return block.OfValues(kSolve == Solve::kResidual ? block.slice.residual : block.slice.ddelta, t, j);
}

template <typename T, Solve kSolve>
__device__ float& Solution(const DeltaBlock<T>& block, int64_t t, int64_t j) {
  if (kSolve == Solve::kKeys) return block.OfKeys(block.slice.w, t, j);
  return block.OfValues(kSolve == Solve::kTransposed ? block.slice.ddelta : block.slice.delta, t, j);
}

template <typename T, Solve kSolve>
__global__ void __launch_bounds__(kSolveColumns)
    SolveKernel(const __grid_constant__ DeltaSlice<T> slice, int64_t columns) {
  extern __shared__ float memory[];
  const DeltaBlock<T> block(slice, blockIdx.x);
  const int rows = static_cast<int>(block.m), thread = static_cast<int>(threadIdx.x);
  const int64_t column = int64_t{blockIdx.y} * kSolveColumns + thread;
  float* gram = memory;
  float* x = memory + rows * rows + thread;
  const float* from = &block.Square(slice.gram, 0, 0);
  const int side = static_cast<int>(slice.Side());
#pragma unroll 8
  for (int e = thread; e < rows * rows; e += kSolveColumns) {
    gram[e] = block.Beta(e / rows) * from[e / rows * side + e % rows];
  }
  const int64_t inside = min(column, columns - 1);
#pragma unroll 8
  for (int t = 0; t < rows; ++t) x[t * kSolveColumns] = RightSide<T, kSolve>(block, t, inside);
  __syncthreads();
  if (column >= columns) return;
  for (int i = 0; i < rows; ++i) {
    const int t = kSolve == Solve::kTransposed ? rows - 1 - i : i;
    float sum[4] = {};  // apart: one would wait for the other
    const int begin = kSolve == Solve::kTransposed ? t + 1 : 0, end = kSolve == Solve::kTransposed ? rows : t;
    const int row = kSolve == Solve::kTransposed ? 1 : rows, next = kSolve == Solve::kTransposed ? rows : 1;
    int s = begin;
    for (; s + 4 <= end; s += 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum[j] = fmaf(gram[t * row + (s + j) * next], x[(s + j) * kSolveColumns], sum[j]);
      }
    }
    for (; s < end; ++s) sum[0] = fmaf(gram[t * row + s * next], x[s * kSolveColumns], sum[0]);
    const float value = x[t * kSolveColumns] - ((sum[0] + sum[1]) + (sum[2] + sum[3]));
    x[t * kSolveColumns] = value;
    Solution<T, kSolve>(block, t, column) = value;
  }
}

template <Solve kSolve, typename T>
cudaError_t LaunchSolve(const DeltaSlice<T>& slice, int64_t columns, cudaStream_t stream) {
  const int64_t side = slice.Side(), blocks = slice.chunks * slice.rule.all_heads();
  if (blocks == 0 || columns == 0) return cudaSuccess;
  const auto shared = static_cast<int>(4 * side * (side + kSolveColumns));
  const cudaError_t error =
      cudaFuncSetAttribute(SolveKernel<T, kSolve>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<uint32_t>(blocks), static_cast<uint32_t>(CeilDiv(columns, kSolveColumns)));
  SolveKernel<T, kSolve><<<grid, kSolveColumns, static_cast<size_t>(shared), stream>>>(slice, columns);
  return cudaGetLastError();
}

// Segments without rows: no state, and a transition that changes nothing.
__global__ void EmptySummaryKernel(int64_t heads, int64_t k, int64_t v, const CudaSsdSummary summary) {
  const int64_t index = int64_t{blockIdx.x} * heads + blockIdx.y;
  for (int64_t e = threadIdx.x; e < k * v; e += blockDim.x) summary.state[index * k * v + e] = 0;
  for (int64_t e = threadIdx.x; e < k * k; e += blockDim.x) {
    summary.transition[index * k * k + e] = e / k == e % k ? 1 : 0;
  }
}

template <typename T>
cudaError_t BeginSummary(const CudaSsd<T>& rule, const CudaSsdSummary& summary, cudaStream_t stream) {
  if (rule.chunks.count == 0 || rule.all_heads() == 0) return cudaSuccess;
  const dim3 grid(static_cast<uint32_t>(rule.chunks.count), static_cast<uint32_t>(rule.all_heads()));
  EmptySummaryKernel<<<grid, 256, 0, stream>>>(rule.all_heads(), rule.state, rule.dim, summary);
  return cudaGetLastError();
}

}  // namespace

template <typename T>
cudaError_t FillGramAndScores(const DeltaSlice<T>& slice, cudaStream_t stream) {
  const int64_t side = slice.Side();
  const cudaError_t error = LaunchDelta<Gram<T>>(slice, Nothing{}, side, side, stream);
  if (error != cudaSuccess) return error;
  return LaunchDelta<Scores<T>>(slice, Nothing{}, side, side, stream);
}

template <typename T>
cudaError_t SolveKeys(const DeltaSlice<T>& slice, cudaStream_t stream) {
  return LaunchSolve<Solve::kKeys>(slice, slice.rule.state, stream);
}
template <typename T>
cudaError_t SolveValues(const DeltaSlice<T>& slice, cudaStream_t stream) {
  return LaunchSolve<Solve::kValues>(slice, slice.rule.dim, stream);
}
template <typename T>
cudaError_t SolveResidual(const DeltaSlice<T>& slice, cudaStream_t stream) {
  return LaunchSolve<Solve::kResidual>(slice, slice.rule.dim, stream);
}
template <typename T>
cudaError_t SolveTransposed(const DeltaSlice<T>& slice, cudaStream_t stream) {
  return LaunchSolve<Solve::kTransposed>(slice, slice.rule.dim, stream);
}

template <typename T>
cudaError_t FillDeltaGradient(const DeltaSlice<T>& slice, StridedRows<const T> dout, cudaStream_t stream) {
  return LaunchDelta<OutputToDelta<T>>(slice, dout, slice.Side(), slice.rule.dim, stream);
}

template <typename T>
int64_t CudaDeltaScratchBytes(const CudaSsd<T>& rule) {
  return DeltaSlice<T>(rule, nullptr).bytes;
}

template <typename T>
cudaError_t CudaDeltaSummary(const CudaSsd<T>& rule, const CudaSsdSummary& summary, void* scratch,
                             cudaStream_t stream) {
  const DeltaSlice<T> all(rule, scratch);
  cudaError_t error = BeginSummary(rule, summary, stream);
  if (error == cudaSuccess) error = FillRowDecays<T>(rule, all.decays, nullptr, stream);
  if (error != cudaSuccess) return error;
  return ForEachSlice(all, ScanOrder::kForward, [&](const DeltaSlice<T>& slice) {
    cudaError_t step = FillGramAndScores(slice, stream);
    if (step == cudaSuccess) step = SolveKeys(slice, stream);
    if (step == cudaSuccess) step = SolveValues(slice, stream);
    if (step != cudaSuccess) return step;
    return ScanDelta<T>(slice, {.end = rule.dim + rule.state, .summary = summary}, stream);
  });
}

template <typename T>
cudaError_t CudaDeltaForward(const CudaSsd<T>& rule, const float* initial, float* states, StridedRows<T> o,
                             void* scratch, cudaStream_t stream) {
  const DeltaSlice<T> all(rule, scratch);
  const cudaError_t error = FillRowDecays<T>(rule, all.decays, nullptr, stream);
  if (error != cudaSuccess) return error;
  return ForEachSlice(all, ScanOrder::kForward, [&](const DeltaSlice<T>& slice) {
    cudaError_t step = FillGramAndScores(slice, stream);
    if (step == cudaSuccess) step = SolveKeys(slice, stream);
    if (step == cudaSuccess) step = SolveValues(slice, stream);
    if (step == cudaSuccess) {
      step = ScanDelta<T>(slice, {.end = rule.dim, .initial = initial, .states = states}, stream);
    }
    if (step != cudaSuccess) return step;
    return LaunchDelta<Output<T>>(slice, typename Output<T>::Extra{states, o}, slice.Side(), rule.dim,
                                  stream);
  });
}

template <typename T>
cudaError_t CudaDeltaBackwardSummary(const CudaSsd<T>& rule, StridedRows<const T> dout,
                                     const CudaSsdSummary& summary, void* scratch, cudaStream_t stream) {
  const DeltaSlice<T> all(rule, scratch);
  cudaError_t error = BeginSummary(rule, summary, stream);
  if (error == cudaSuccess) error = FillRowDecays<T>(rule, all.decays, nullptr, stream);
  if (error == cudaSuccess) {
    error = ForEachSlice(all, ScanOrder::kForward, [&](const DeltaSlice<T>& slice) {
      cudaError_t step = FillGramAndScores(slice, stream);
      if (step == cudaSuccess) step = SolveKeys(slice, stream);
      if (step != cudaSuccess) return step;
      return ScanDelta<T>(slice, {.begin = rule.dim, .end = rule.dim + rule.state, .summary = summary},
                          stream);
    });
  }
  if (error != cudaSuccess) return error;
  return ForEachSlice(all, ScanOrder::kBackward, [&](const DeltaSlice<T>& slice) {
    cudaError_t step = FillGramAndScores(slice, stream);
    if (step == cudaSuccess) step = SolveKeys(slice, stream);
    if (step == cudaSuccess) step = FillDeltaGradient(slice, dout, stream);
    if (step != cudaSuccess) return step;
    return ScanDelta<T>(
        slice, {.order = ScanOrder::kBackward, .end = rule.dim, .summary = summary, .dout = dout}, stream);
  });
}

#define ANNULUS_INSTANTIATE(T)                                                                          \
  template cudaError_t FillGramAndScores(const DeltaSlice<T>&, cudaStream_t);                           \
  template cudaError_t SolveKeys(const DeltaSlice<T>&, cudaStream_t);                                   \
  template cudaError_t SolveValues(const DeltaSlice<T>&, cudaStream_t);                                 \
  template cudaError_t SolveResidual(const DeltaSlice<T>&, cudaStream_t);                               \
  template cudaError_t SolveTransposed(const DeltaSlice<T>&, cudaStream_t);                             \
  template cudaError_t FillDeltaGradient(const DeltaSlice<T>&, StridedRows<const T>, cudaStream_t);     \
  template int64_t CudaDeltaScratchBytes(const CudaSsd<T>&);                                            \
  template cudaError_t CudaDeltaSummary(const CudaSsd<T>&, const CudaSsdSummary&, void*, cudaStream_t); \
  template cudaError_t CudaDeltaForward(const CudaSsd<T>&, const float*, float*, StridedRows<T>, void*, \
                                        cudaStream_t);                                                  \
  template cudaError_t CudaDeltaBackwardSummary(const CudaSsd<T>&, StridedRows<const T>,                \
                                                const CudaSsdSummary&, void*, cudaStream_t)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(__nv_bfloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
