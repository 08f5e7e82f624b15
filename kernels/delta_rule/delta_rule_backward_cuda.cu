// Backward of the gated delta rule. With G the gradient of the state at a chunk's end and u = delta / beta
// what is written before its factor:
//
//   ddelta = P^T do + to_end K G     Z = T^T ddelta     dG of the chunk before: decay G + (from_start Q)^T do
//                                                                                - W^T ddelta
//   dv = beta Z     dbeta_t = Z_t . u_t     dB = -beta Z delta^T     dP = do delta^T
//   dq = (dP o L) K + from_start S_0 do
//   dk = (dB o L) K + (dB o L)^T K + (dP o L)^T Q - from_start beta S_0 Z + to_end G delta
//
// da as in the backward of the scan without the rule: what a decay between two rows gets goes to the sum at
// the later one and is taken from the sum at the earlier one.

#include "kernels/delta_rule/delta_slice.cuh"

namespace annulus::kernels {
namespace {

// beta (v - from_start S_0^T k), or with kInside also less what the rows before in the chunk hold and without
// beta: u.
enum class Residual { kBefore, kInside };
template <typename T, Residual kResidual>
struct Residuals : DeltaBlock<T> {
  const float* states;
  __device__ Residuals(const DeltaSlice<T>& slice, int64_t index, const float* s)
      : DeltaBlock<T>(slice, index), states(s) {
    this->n = slice.rule.dim;
    this->k = slice.rule.state + (kResidual == Residual::kInside ? this->m : 0);
  }
  __device__ float Left(int64_t i, int64_t l) const {
    const int64_t keys = this->slice.rule.state;
    return l < keys ? this->FromStart(i) * this->K(i, l) : this->Square(this->slice.gram, i, l - keys);
  }
  __device__ float Right(int64_t l, int64_t j) const {
    const int64_t keys = this->slice.rule.state;
    return l < keys ? this->State(states, l, j) : this->OfValues(this->slice.delta, l - keys, j);
  }
  __device__ void Store(int64_t i, int64_t j, float sum) const {
    const float rest = this->V(i, j) - sum;
    this->OfValues(this->slice.residual, i, j) = kResidual == Residual::kBefore ? this->Beta(i) * rest : rest;
  }
};

template <typename T>
struct GramGradient : DeltaBlock<T> {
  __device__ GramGradient(const DeltaSlice<T>& slice, int64_t index, const CudaDeltaGradients<T>&)
      : DeltaBlock<T>(slice, index) {
    this->k = slice.rule.dim;
  }
  __device__ float Left(int64_t i, int64_t l) const { return this->OfValues(this->slice.ddelta, i, l); }
  __device__ float Right(int64_t l, int64_t j) const { return this->OfValues(this->slice.delta, j, l); }
  __device__ void Store(int64_t i, int64_t j, float sum) const {
    const float gradient = j < i ? -this->Beta(i) * sum : 0;
    this->Square(this->slice.dgram, i, j) = gradient * this->at.Decay(i, j);
    this->Square(this->slice.energies, i, j) = gradient * this->Square(this->slice.gram, i, j);
  }
};

// After GramGradient: the energies are added to.
template <typename T>
struct ScoresGradient : DeltaBlock<T> {
  StridedRows<const T> dout;
  __device__ ScoresGradient(const DeltaSlice<T>& slice, int64_t index, const CudaDeltaGradients<T>& to)
      : DeltaBlock<T>(slice, index), dout(to.dout) {
    this->k = slice.rule.dim;
  }
  __device__ float Left(int64_t i, int64_t l) const { return this->at.Of(dout, i, l); }
  __device__ float Right(int64_t l, int64_t j) const { return this->OfValues(this->slice.delta, j, l); }
  __device__ void Store(int64_t i, int64_t j, float sum) const {
    this->Square(this->slice.dscores, i, j) = sum * this->at.Decay(i, j);
    this->Square(this->slice.energies, i, j) += sum * this->Square(this->slice.scores, i, j);
  }
};

// What states give to keys and queries: a state times a panel of values.
enum class Path { kKeysFromStart, kKeysToEnd, kQueriesFromStart };
template <typename T, Path kPath>
struct StateGradient : DeltaBlock<T> {
  const CudaDeltaGradients<T>& to;
  __device__ StateGradient(const DeltaSlice<T>& slice, int64_t index, const CudaDeltaGradients<T>& t)
      : DeltaBlock<T>(slice, index), to(t) {
    this->n = slice.rule.state;
    this->k = slice.rule.dim;
  }
  __device__ float Left(int64_t i, int64_t l) const {
    if (kPath == Path::kKeysFromStart) return this->OfValues(this->slice.ddelta, i, l);
    if (kPath == Path::kKeysToEnd) return this->OfValues(this->slice.delta, i, l);
    return this->at.Of(to.dout, i, l);
  }
  __device__ float Right(int64_t l, int64_t j) const {
    return kPath == Path::kKeysToEnd ? this->Gradient(j, l) : this->State(to.states, j, l);
  }
  __device__ void Store(int64_t i, int64_t j, float sum) const {
    if (kPath == Path::kKeysFromStart) {
      this->OfKeys(this->slice.dkeys_start, i, j) = -this->FromStart(i) * this->Beta(i) * sum;
    } else if (kPath == Path::kKeysToEnd) {
      this->OfKeys(this->slice.dkeys_end, i, j) = this->ToEnd(i) * sum;
    } else {
      this->OfKeys(this->slice.dqueries, i, j) = this->FromStart(i) * sum;
    }
  }
};

template <typename T>
struct QueryGradient : DeltaBlock<T> {
  StridedRows<T> dq;
  __device__ QueryGradient(const DeltaSlice<T>& slice, int64_t index, const CudaDeltaGradients<T>& to)
      : DeltaBlock<T>(slice, index), dq(to.dq) {
    this->n = slice.rule.state;
  }
  __device__ float Left(int64_t i, int64_t l) const { return this->Square(this->slice.dscores, i, l); }
  __device__ float Right(int64_t l, int64_t j) const { return this->K(l, j); }
  __device__ void Store(int64_t i, int64_t j, float sum) const {
    this->at.At(dq, i, this->at.head, this->n)[j] =
        FromFloat<T>(sum + this->OfKeys(this->slice.dqueries, i, j));
  }
};

// Its three products one after the other.
template <typename T>
struct KeyGradient : DeltaBlock<T> {
  StridedRows<T> dk;
  __device__ KeyGradient(const DeltaSlice<T>& slice, int64_t index, const CudaDeltaGradients<T>& to)
      : DeltaBlock<T>(slice, index), dk(to.dk) {
    this->n = slice.rule.state;
    this->k = 3 * this->m;
  }
  __device__ float Left(int64_t i, int64_t l) const {
    if (l < this->m) return this->Square(this->slice.dgram, i, l);
    if (l < 2 * this->m) return this->Square(this->slice.dgram, l - this->m, i);
    return this->Square(this->slice.dscores, l - 2 * this->m, i);
  }
  __device__ float Right(int64_t l, int64_t j) const {
    return l < 2 * this->m ? this->K(l % this->m, j) : this->Q(l - 2 * this->m, j);
  }
  __device__ void Store(int64_t i, int64_t j, float sum) const {
    this->at.At(dk, i, this->at.head, this->n)[j] = FromFloat<T>(
        sum + this->OfKeys(this->slice.dkeys_start, i, j) + this->OfKeys(this->slice.dkeys_end, i, j));
  }
};

constexpr int kGateThreads = 128;

// Sum over the CTA, in all threads.
__device__ double CtaSum(double x, double* part) {
  x = WarpSum(x);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kGateThreads / 32; ++w) sum += part[w];
  __syncthreads();
  return sum;
}

// dv, dbeta and da of one head of one chunk.
template <typename T>
__global__ void __launch_bounds__(kGateThreads)
    GateGradientsKernel(const __grid_constant__ DeltaSlice<T> slice,
                        const __grid_constant__ CudaDeltaGradients<T> to) {
  __shared__ double dsum[kMaxDeltaChunk], part[kGateThreads / 32];
  const DeltaBlock<T> block(slice, blockIdx.x);
  const int64_t rows = block.m, values = slice.rule.dim, keys = slice.rule.state;
  double to_end = 0;
  for (int64_t r = threadIdx.x; r < rows; r += kGateThreads) {
    double dbeta = 0, own = 0, end = 0;
    T* dv = block.at.At(to.dv, r, block.at.head, values);
    for (int64_t j = 0; j < values; ++j) {
      const float z = block.OfValues(slice.ddelta, r, j);
      dbeta += z * block.OfValues(slice.residual, r, j);
      dv[j] = FromFloat<T>(block.Beta(r) * z);
    }
    for (int64_t s = 0; s <= r; ++s) own += block.Square(slice.energies, r, s);
    for (int64_t t = r; t < rows; ++t) own -= block.Square(slice.energies, t, r);
    for (int64_t i = 0; i < keys; ++i) {
      own += block.K(r, i) * block.OfKeys(slice.dkeys_start, r, i);
      own += block.Q(r, i) * block.OfKeys(slice.dqueries, r, i);
      end += block.K(r, i) * block.OfKeys(slice.dkeys_end, r, i);
    }
    dsum[r] = own - end;
    to_end += end;
    to.dbeta[block.at.Gate(r)] = static_cast<float>(dbeta);
  }
  double through = 0;
  for (int64_t e = threadIdx.x; e < keys * values; e += kGateThreads) {
    through += block.State(to.states, e / values, e % values) * block.Gradient(e / values, e % values);
  }
  through = CtaSum(through, part);
  to_end = CtaSum(to_end, part);
  if (threadIdx.x != 0) return;
  double later = to_end + block.FromStart(rows - 1) * through;
  for (int64_t r = rows - 1; r >= 0; --r) {
    later += dsum[r];
    const bool starts = block.at.Age(r) == 0;
    to.da[block.at.Gate(r)] = starts ? 0 : static_cast<float>(later);
    if (starts) later = 0;
  }
}

template <typename T>
cudaError_t BackwardSlice(const DeltaSlice<T>& slice, const CudaDeltaGradients<T>& to, cudaStream_t stream) {
  const int64_t side = slice.Side(), k = slice.rule.state, v = slice.rule.dim;
  cudaError_t error = FillGramAndScores(slice, stream);
  const auto then = [&](auto&& launch) {
    if (error == cudaSuccess) error = launch();
  };
  then([&] { return SolveKeys(slice, stream); });
  then([&] { return LaunchDelta<Residuals<T, Residual::kBefore>>(slice, to.states, side, v, stream); });
  then([&] { return SolveResidual(slice, stream); });
  then([&] { return FillDeltaGradient(slice, to.dout, stream); });
  then([&] {
    return ScanDelta<T>(slice,
                        {.order = ScanOrder::kBackward,
                         .end = v,
                         .initial = to.final_gradient,
                         .slice_states = slice.gradients,
                         .dout = to.dout},
                        stream);
  });
  then([&] { return SolveTransposed(slice, stream); });
  then([&] { return LaunchDelta<Residuals<T, Residual::kInside>>(slice, to.states, side, v, stream); });
  then([&] { return LaunchDelta<GramGradient<T>>(slice, to, side, side, stream); });
  then([&] { return LaunchDelta<ScoresGradient<T>>(slice, to, side, side, stream); });
  then([&] { return LaunchDelta<StateGradient<T, Path::kKeysFromStart>>(slice, to, side, k, stream); });
  then([&] { return LaunchDelta<StateGradient<T, Path::kKeysToEnd>>(slice, to, side, k, stream); });
  then([&] { return LaunchDelta<StateGradient<T, Path::kQueriesFromStart>>(slice, to, side, k, stream); });
  then([&] { return LaunchDelta<QueryGradient<T>>(slice, to, side, k, stream); });
  then([&] { return LaunchDelta<KeyGradient<T>>(slice, to, side, k, stream); });
  const int64_t blocks = slice.chunks * slice.rule.all_heads();
  if (error != cudaSuccess || blocks == 0) return error;
  GateGradientsKernel<<<static_cast<uint32_t>(blocks), kGateThreads, 0, stream>>>(slice, to);
  return cudaGetLastError();
}

}  // namespace

template <typename T>
cudaError_t CudaDeltaBackward(const CudaSsd<T>& rule, const CudaDeltaGradients<T>& gradients, void* scratch,
                              cudaStream_t stream) {
  const DeltaSlice<T> all(rule, scratch);
  const cudaError_t error = FillRowDecays<T>(rule, all.decays, nullptr, stream);
  if (error != cudaSuccess) return error;
  return ForEachSlice(all, ScanOrder::kBackward,
                      [&](const DeltaSlice<T>& slice) { return BackwardSlice(slice, gradients, stream); });
}

template cudaError_t CudaDeltaBackward(const CudaSsd<float>&, const CudaDeltaGradients<float>&, void*,
                                       cudaStream_t);
template cudaError_t CudaDeltaBackward(const CudaSsd<__nv_bfloat16>&,
                                       const CudaDeltaGradients<__nv_bfloat16>&, void*, cudaStream_t);

}  // namespace annulus::kernels
