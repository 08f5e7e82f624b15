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
  float* gram = memory;
  float* x = memory + rows * rows + thread;
  for (int t = 0; t < rows; ++t) {
    for (int s = thread; s < rows; s += kSolveColumns) {
      gram[t * rows + s] = block.Beta(t) * block.Square(slice.gram, t, s);
    }
  }
  __syncthreads();
  const int64_t column = int64_t{blockIdx.y} * kSolveColumns + thread;
  if (column >= columns) return;
  for (int i = 0; i < rows; ++i) {
    const int t = kSolve == Solve::kTransposed ? rows - 1 - i : i;
    float sum = 0;
    if (kSolve == Solve::kTransposed) {
      for (int s = t + 1; s < rows; ++s) sum += gram[s * rows + t] * x[s * kSolveColumns];
    } else {
      for (int s = 0; s < t; ++s) sum += gram[t * rows + s] * x[s * kSolveColumns];
    }
    const float value = RightSide<T, kSolve>(block, t, column) - sum;
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

// Scan: a CTA takes 32 columns of one head, a lane a column.
//   shared memory: matrix [rows, K], state [K, 33], panel [rows, 33]
constexpr int kScanColumns = 32, kScanWarps = 8, kScanStride = kScanColumns + 1;

template <typename T>
class ScanColumns {
 public:
  __device__ ScanColumns(const DeltaSlice<T>& slice, const DeltaScan<T>& scan, float* memory)
      : slice_(slice),
        scan_(scan),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32),
        keys_(static_cast<int>(slice.rule.state)),
        column_(scan.begin + int64_t{blockIdx.y} * kScanColumns + lane_),
        value_(column_ < slice.rule.dim),
        inside_(column_ < scan.end),
        matrix_(memory),
        state_(memory + slice.Side() * keys_),
        panel_(state_ + keys_ * kScanStride) {}

  __device__ void Run() {
    const int64_t heads = slice_.rule.batch * slice_.rule.heads;
    for (int64_t i = 0; i < slice_.chunks; ++i) {
      const int64_t chunk = scan_.order == ScanOrder::kForward ? i : slice_.chunks - 1 - i;
      const DeltaBlock<T> block(slice_, chunk * heads + blockIdx.x);
      const bool forward = scan_.order == ScanOrder::kForward;
      if (forward ? block.at.rows.first : block.at.rows.last) {
        Begin(block);
      } else if (i == 0) {
        ForState([&](int k, float* s) { *s = slice_.carry[CarryAt(k)]; });
      }
      Keep(block);
      if (forward) {
        Forward(block);
      } else {
        Backward(block);
      }
      if (forward ? block.at.rows.last : block.at.rows.first) Summarise(block);
      if (i + 1 == slice_.chunks) ForState([&](int k, float* s) { slice_.carry[CarryAt(k)] = *s; });
    }
  }

 private:
  // fn(row of the state, its element in this lane's column)
  template <typename Fn>
  __device__ void ForState(const Fn& fn) {
    if (!inside_) return;
    for (int k = warp_; k < keys_; k += kScanWarps) fn(k, state_ + k * kScanStride + lane_);
  }
  __device__ int64_t CarryAt(int k) const {
    return (int64_t{blockIdx.x} * keys_ + k) * (slice_.rule.dim + keys_) + column_;
  }
  // Of [segments or chunks, batch * heads, K, V].
  __device__ int64_t StateAt(int64_t outer, int k) const {
    const int64_t heads = slice_.rule.batch * slice_.rule.heads;
    return ((outer * heads + blockIdx.x) * keys_ + k) * slice_.rule.dim + column_;
  }
  __device__ void Begin(const DeltaBlock<T>& block) {
    ForState([&](int k, float* s) {
      if (!value_) {
        *s = column_ - slice_.rule.dim == k ? 1 : 0;
      } else {
        *s = scan_.initial != nullptr ? scan_.initial[StateAt(block.at.rows.segment, k)] : 0;
      }
    });
  }
  __device__ void Keep(const DeltaBlock<T>& block) {
    if (!value_) return;
    ForState([&](int k, float* s) {
      if (scan_.states != nullptr) scan_.states[StateAt(block.at.chunk, k)] = *s;
      if (scan_.slice_states != nullptr) {
        scan_.slice_states[StateAt(block.at.chunk - slice_.first_chunk, k)] = *s;
      }
    });
  }
  __device__ void Summarise(const DeltaBlock<T>& block) {
    const int64_t heads = slice_.rule.batch * slice_.rule.heads, segment = block.at.rows.segment;
    ForState([&](int k, float* s) {
      if (value_ && scan_.summary.state != nullptr) scan_.summary.state[StateAt(segment, k)] = *s;
      if (!value_ && scan_.summary.transition != nullptr) {
        scan_.summary
            .transition[((segment * heads + blockIdx.x) * keys_ + k) * keys_ + column_ - slice_.rule.dim] =
            *s;
      }
    });
  }

  // matrix[t, k] = fn(t, k)
  template <typename Fn>
  __device__ void LoadMatrix(const DeltaBlock<T>& block, const Fn& fn) {
    __syncthreads();
    for (int e = static_cast<int>(threadIdx.x); e < block.m * keys_; e += 32 * kScanWarps) {
      matrix_[e] = fn(e / keys_, e % keys_);
    }
    __syncthreads();
  }
  // panel[t] = first(t) + sign matrix[t] state
  template <typename Fn>
  __device__ void FillPanel(const DeltaBlock<T>& block, float sign, const Fn& first) {
    for (int t = warp_; t < block.m; t += kScanWarps) {
      float sum = 0;
      for (int k = 0; k < keys_; ++k) sum += matrix_[t * keys_ + k] * state_[k * kScanStride + lane_];
      panel_[t * kScanStride + lane_] = inside_ ? first(t) + sign * sum : 0;
    }
    __syncthreads();
  }
  // state = factor state + sign matrix^T panel
  __device__ void AddToState(const DeltaBlock<T>& block, float factor, float sign) {
    for (int k = warp_; k < keys_; k += kScanWarps) {
      float sum = 0;
      for (int t = 0; t < block.m; ++t) sum += matrix_[t * keys_ + k] * panel_[t * kScanStride + lane_];
      float* s = state_ + k * kScanStride + lane_;
      *s = factor * *s + sign * sum;
    }
  }

  __device__ void Forward(const DeltaBlock<T>& block) {
    LoadMatrix(block, [&](int t, int k) { return block.OfKeys(slice_.w, t, k); });
    FillPanel(block, -1, [&](int t) { return value_ ? block.OfValues(slice_.delta, t, column_) : 0.0f; });
    if (value_ && inside_) {
      for (int t = warp_; t < block.m; t += kScanWarps) {
        block.OfValues(slice_.delta, t, column_) = panel_[t * kScanStride + lane_];
      }
    }
    LoadMatrix(block, [&](int t, int k) { return block.ToEnd(t) * block.K(t, k); });
    AddToState(block, block.FromStart(block.m - 1), 1);
    __syncthreads();
  }

  __device__ void Backward(const DeltaBlock<T>& block) {
    LoadMatrix(block, [&](int t, int k) { return block.ToEnd(t) * block.K(t, k); });
    FillPanel(block, 1, [&](int t) { return block.OfValues(slice_.ddelta, t, column_); });
    if (inside_) {
      for (int t = warp_; t < block.m; t += kScanWarps) {
        block.OfValues(slice_.ddelta, t, column_) = panel_[t * kScanStride + lane_];
      }
    }
    LoadMatrix(block, [&](int t, int k) { return block.OfKeys(slice_.w, t, k); });
    AddToState(block, block.FromStart(block.m - 1), -1);
    LoadMatrix(block, [&](int t, int k) { return block.FromStart(t) * block.Q(t, k); });
    for (int t = warp_; t < block.m; t += kScanWarps) {
      panel_[t * kScanStride + lane_] = inside_ ? block.at.Of(scan_.dout, t, column_) : 0;
    }
    __syncthreads();
    AddToState(block, 1, 1);
    __syncthreads();
  }

  const DeltaSlice<T>& slice_;
  const DeltaScan<T>& scan_;
  const int lane_, warp_, keys_;
  const int64_t column_;
  const bool value_, inside_;
  float* matrix_;
  float* state_;
  float* panel_;
};

template <typename T>
__global__ void __launch_bounds__(32 * kScanWarps)
    ScanKernel(const __grid_constant__ DeltaSlice<T> slice, const __grid_constant__ DeltaScan<T> scan) {
  extern __shared__ float memory[];
  ScanColumns<T>(slice, scan, memory).Run();
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
  return FillScores(slice.rule, slice.decays, TimesDt::kNo, slice.first_chunk, slice.chunks, slice.scores,
                    stream);
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
cudaError_t ScanDelta(const DeltaSlice<T>& slice, const DeltaScan<T>& scan, cudaStream_t stream) {
  if (slice.rule.all_heads() == 0 || scan.end == scan.begin) return cudaSuccess;
  const auto shared = static_cast<int>(
      4 * (slice.Side() * slice.rule.state + (slice.rule.state + slice.Side()) * kScanStride));
  const cudaError_t error =
      cudaFuncSetAttribute(ScanKernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<uint32_t>(slice.rule.all_heads()),
                  static_cast<uint32_t>(CeilDiv(scan.end - scan.begin, kScanColumns)));
  ScanKernel<T><<<grid, 32 * kScanWarps, static_cast<size_t>(shared), stream>>>(slice, scan);
  return cudaGetLastError();
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
  template cudaError_t ScanDelta(const DeltaSlice<T>&, const DeltaScan<T>&, cudaStream_t);              \
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
