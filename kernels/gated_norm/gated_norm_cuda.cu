// Gated RMSNorm, each group of a row in the registers of the threads that share it: one read, one write. With
//   kSiluBefore  v = x a, up = w dy        else  v = x, up = w dy a          a = silu(gate) or sigmoid(gate)
// and r the inverse norm of v:   y = w x r a     dv = r (up - v r^2 mean(up v))     sum(up v) = sum(w dy x a)
//
// Floors, elements moved per element of x: forward 3, backward 5. Both run at memory speed (on H200 94% and
// 91% of a copy's); the backward issues 42 instructions an element, 0.6 of what its memory takes.

#include "kernels/common/row_walk.cuh"
#include "kernels/common/sigmoid.cuh"
#include "kernels/gated_norm/gated_norm_cuda.h"

namespace annulus::kernels {
namespace {

// Of a gate and its sigmoid.
template <CudaGate kGate>
__device__ float Activation(float gate, float sigmoid) {
  return kGate == CudaGate::kSigmoidAfter ? sigmoid : gate * sigmoid;
}
// Of a sigmoid and the activation that it makes.
template <CudaGate kGate>
__device__ float Slope(float activation, float sigmoid) {
  if (kGate == CudaGate::kSigmoidAfter) return fmaf(-sigmoid, sigmoid, sigmoid);
  return fmaf(activation, 1.0f - sigmoid, sigmoid);
}

// CTAs for whose threads an SM has registers.
template <typename S>
constexpr int kForwardCtas = S::kThreads == kBlockThreads  ? 5
                             : S::kThreads <= kPairThreads ? 2
                                                           : 1;
template <typename S>
constexpr int kBackwardCtas = S::kThreads == kBlockThreads  ? 4
                              : S::kThreads <= kPairThreads ? 2
                                                            : 1;
// Sigmoids are kept from the sums to what needs them where there are registers for them.
template <typename S>
constexpr bool kKeepsSigmoids = S::kThreads == kBlockThreads;

// As RowSum, in the code that the forward of one group was measured with: with RowSum<S, float> the compiler
// saves registers, a third CTA fits an SM, and it reached 79% of a copy's speed for 93%.
template <typename S>
__device__ float2 RowSums(float2 x, float2* part) {
  x = {WarpSum(x.x), WarpSum(x.y)};
  const int warps = S::RowThreads() / 32;
  if (warps == 1) return x;
  part += threadIdx.y * warps;
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  float2 sum = {0, 0};
  for (int w = 0; w < warps; ++w) {
    sum.x += part[w].x;
    sum.y += part[w].y;
  }
  return sum;
}

// What the sums of a row's columns are worth.
struct RowScale {
  float per_column, eps;
  template <typename T>
  __device__ explicit RowScale(const CudaGatedNormArgs<T>& args)
      : per_column(1.0f / static_cast<float>(args.group_columns)), eps(static_cast<float>(args.eps)) {}
  __device__ float InverseNorm(float squares) const { return rsqrtf(fmaf(squares, per_column, eps)); }
};

// The sigmoids of a row's gates, kept or computed again.
template <typename T, typename S>
struct Sigmoids {
  float kept[kKeepsSigmoids<S> ? S::V : 1][S::N];
  __device__ void Keep(int v, int i, float sigmoid) {
    if constexpr (kKeepsSigmoids<S>) kept[v][i] = sigmoid;
  }
  __device__ float At(int v, int i, float gate) const {
    if constexpr (kKeepsSigmoids<S>) return kept[v][i];
    return Sigmoid<T>(gate);
  }
};

// CTAs (part, group) take rows as WalkRows does.
template <typename T, typename S, CudaGate kGate>
__global__ void __launch_bounds__(S::kThreads, kForwardCtas<S>)
    ForwardKernel(const __grid_constant__ CudaGatedNormArgs<T> args, T* __restrict__ out,
                  int64_t out_stride) {
  constexpr int N = S::N, V = S::V;
  constexpr bool kBefore = kGate == CudaGate::kSiluBefore;
  __shared__ float2 part[2][S::kThreads / 32];
  extern __shared__ uint4 ring_memory[];
  const int64_t group = blockIdx.y, first = group * args.columns;
  const RowPart<T, S> w(args.w + group * args.weight_step, args.columns);
  const RowRing<T, S, 2> ring(ring_memory, args.tokens, args.columns,
                              {{args.x + first, args.x_stride}, {args.gate + first, args.gate_stride}});
  const RowScale scale(args);
  int parity = 0;  // two buffers: one barrier a row
  WalkRows(ring, args.tokens, [&](int64_t token, const auto& load) {
    float value[V][N];  // x a
    float squares = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Pack<T, N> x = load(0, v), gate = load(1, v);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        value[v][i] = x[i] * Activation<kGate>(gate[i], Sigmoid<T>(gate[i]));
        const float normed = kBefore ? value[v][i] : x[i];
        squares = fmaf(normed, normed, squares);
      }
    }
    float* given = args.sums + token * args.groups + group;
    if (args.pass != NormPass::kFinish) squares = RowSums<S>({squares, 0}, part[parity]).x;
    parity ^= 1;
    if (token >= args.tokens) return;
    if (args.pass == NormPass::kSums) {
      if (threadIdx.x == 0) *given = squares;
      return;
    }
    const float inverse = scale.InverseNorm(args.pass == NormPass::kFinish ? *given : squares);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (!S::Has(v, args.columns)) continue;
      float y[N];
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] = w.pack[v][i] * (value[v][i] * inverse);
      StorePackStreaming<N>(PackOf<T>(y), out + token * out_stride + first + S::Column(v));
    }
  });
}

// CTAs (part, group) take rows as WalkRows does; row y of one leaves its sum of dw in
// scratch[part * blockDim.y + y, group, :].
template <typename T, typename S, CudaGate kGate>
__global__ void __launch_bounds__(S::kThreads, kBackwardCtas<S>)
    BackwardKernel(const __grid_constant__ CudaGatedNormArgs<T> args,
                   const __grid_constant__ CudaGatedNormGradients<T> to) {
  constexpr int N = S::N, V = S::V;
  constexpr bool kBefore = kGate == CudaGate::kSiluBefore;
  __shared__ float2 part[2][S::kThreads / 32];
  extern __shared__ uint4 ring_memory[];
  const int64_t group = blockIdx.y, first = group * args.columns;
  const RowPart<T, S> w(args.w + group * args.weight_step, args.columns);
  float dw[V][N] = {};
  const RowRing<T, S, 3> ring(ring_memory, args.tokens, args.columns,
                              {{args.x + first, args.x_stride},
                               {args.gate + first, args.gate_stride},
                               {to.dy + first, to.dy_stride}});
  const RowScale scale(args);
  int parity = 0;  // two buffers: one barrier a row
  WalkRows(ring, args.tokens, [&](int64_t token, const auto& load) {
    float2 sums = {0, 0};  // squares, dot
    Sigmoids<T, S> sigmoids;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Pack<T, N> x = load(0, v), gate = load(1, v), dy = load(2, v);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float sigmoid = Sigmoid<T>(gate[i]);
        sigmoids.Keep(v, i, sigmoid);
        const float value = x[i] * Activation<kGate>(gate[i], sigmoid);
        const float normed = kBefore ? value : x[i];
        sums.x = fmaf(normed, normed, sums.x);
        sums.y = fmaf(w.pack[v][i] * dy[i], value, sums.y);
      }
    }
    float* given = args.sums + token * 2 * args.groups + group;
    if (args.pass != NormPass::kFinish) sums = RowSums<S>(sums, part[parity]);
    parity ^= 1;
    if (token >= args.tokens) return;
    if (args.pass == NormPass::kSums) {
      if (threadIdx.x == 0) given[0] = sums.x, given[args.groups] = sums.y;
      return;
    }
    if (args.pass == NormPass::kFinish) sums = {given[0], given[args.groups]};
    const float inverse = scale.InverseNorm(sums.x);
    const float along = sums.y * scale.per_column * inverse * inverse * inverse;
    asm volatile("" ::: "memory");  // the row is read again: held, it would leave too few registers
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Pack<T, N> xs = load(0, v), gates = load(1, v), dys = load(2, v);
      float dx[N], dgate[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float s = sigmoids.At(v, i, gates[i]), a = Activation<kGate>(gates[i], s);
        const float x = xs[i], dy = dys[i], weighted = w.pack[v][i] * dy * inverse, value = x * a;
        const float dv = fmaf(-along, kBefore ? value : x, kBefore ? weighted : weighted * a);
        dw[v][i] = fmaf(dy, value * inverse, dw[v][i]);
        dx[i] = kBefore ? dv * a : dv;
        dgate[i] = (kBefore ? dv : weighted) * x * Slope<kGate>(a, s);
      }
      if (!S::Has(v, args.columns)) continue;
      StorePackStreaming<N>(PackOf<T>(dx), to.dx + token * to.dx_stride + first + S::Column(v));
      StorePackStreaming<N>(PackOf<T>(dgate), to.dgate + token * to.dgate_stride + first + S::Column(v));
    }
  });
  if (args.pass == NormPass::kSums) return;
  const int64_t own = (int64_t{blockIdx.x} * blockDim.y + threadIdx.y) * args.groups + group;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (!S::Has(v, args.columns)) continue;
    StorePack<N>(PackOf<float>(dw[v]), to.scratch + own * args.columns + S::Column(v));
  }
}

constexpr int64_t kMostParts = 2048;  // of all groups together, unless there are more groups

// Fills the device once with CTAs of whole rows, whose number it returns: `parts` a group.
template <typename S, int kOperands, typename T, typename... To>
cudaError_t LaunchWalk(void (*kernel)(CudaGatedNormArgs<T>, To...), const CudaGatedNormArgs<T>& args,
                       cudaStream_t stream, int64_t* part_rows, const To&... to) {
  if (args.groups > UINT16_MAX) return cudaErrorInvalidValue;
  RingCtas cta;
  const cudaError_t error = PlanRingCtas<S, RowRing<T, S, kOperands>>(kernel, args.columns, &cta);
  if (error != cudaSuccess) return error;
  const int64_t rows = cta.threads.y,
                ctas = std::min(int64_t{SmCount()} * std::max(cta.resident, 1), kMostParts);
  const int64_t parts = std::clamp<int64_t>(ctas / args.groups, 1, CeilDiv(args.tokens, rows));
  *part_rows = parts * rows;
  const dim3 grid(static_cast<uint32_t>(parts), static_cast<uint32_t>(args.groups));
  kernel<<<grid, cta.threads, cta.shared_bytes, stream>>>(args, to...);
  return cudaGetLastError();
}

// Calls fn<RowShape>() with vectors as wide as the rows allow, and as few to a thread as CTAs have threads
// for.
template <typename T, int kMostVectors, typename Fn>
cudaError_t VisitShape(bool vectors_fit, int64_t columns, Fn&& fn) {
  constexpr int kN = kVectorElements<T>;
  if (!vectors_fit) return fn.template operator()<RowShape<1, kMostVectors, kMaxRowThreads>>();
  const int64_t vectors = columns / kN;
  if (vectors <= 32) return fn.template operator()<RowShape<kN, 1, kBlockThreads>>();
  if (vectors <= 64) return fn.template operator()<RowShape<kN, 2, kBlockThreads>>();
  if (vectors <= 96) return fn.template operator()<RowShape<kN, 3, kBlockThreads>>();
  if (vectors <= 2 * kPairThreads) return fn.template operator()<RowShape<kN, 2, kPairThreads>>();
  if (vectors <= 4 * kMaxRowThreads) return fn.template operator()<RowShape<kN, 4, kMaxRowThreads>>();
  return fn.template operator()<RowShape<kN, kMostVectors, kMaxRowThreads>>();
}

template <typename Fn>
cudaError_t VisitGate(CudaGate gate, Fn&& fn) {
  switch (gate) {
    case CudaGate::kSiluBefore:
      return fn.template operator()<CudaGate::kSiluBefore>();
    case CudaGate::kSiluAfter:
      return fn.template operator()<CudaGate::kSiluAfter>();
    case CudaGate::kSigmoidAfter:
      return fn.template operator()<CudaGate::kSigmoidAfter>();
  }
  return cudaErrorInvalidValue;
}

template <typename T>
bool VectorsFit(const CudaGatedNormArgs<T>& args) {
  constexpr int kN = kVectorElements<T>;
  return args.columns % kN == 0 && args.x_stride % kN == 0 && args.gate_stride % kN == 0 && Aligned(args.x) &&
         Aligned(args.gate) && Aligned(args.w);
}

}  // namespace

template <typename T>
cudaError_t CudaGatedNormForward(const CudaGatedNormArgs<T>& args, T* y, int64_t y_stride,
                                 cudaStream_t stream) {
  if (args.tokens == 0 || args.columns == 0) return cudaSuccess;
  const bool fit = VectorsFit(args) && Aligned(y) && y_stride % kVectorElements<T> == 0;
  return VisitGate(args.gate_kind, [&]<CudaGate kGate>() {
    return VisitShape<T, 8>(fit, args.columns, [&]<typename S>() {
      int64_t part_rows = 0;
      return LaunchWalk<S, 2>(ForwardKernel<T, S, kGate>, args, stream, &part_rows, y, y_stride);
    });
  });
}

template <typename T>
cudaError_t CudaGatedNormBackward(const CudaGatedNormArgs<T>& args, const CudaGatedNormGradients<T>& to,
                                  cudaStream_t stream) {
  if (args.tokens == 0 || args.columns == 0) return cudaSuccess;
  constexpr int kN = kVectorElements<T>;
  const bool fit = VectorsFit(args) && Aligned(to.dy) && Aligned(to.dx) && Aligned(to.dgate) &&
                   Aligned(to.scratch) && to.dy_stride % kN == 0 && to.dx_stride % kN == 0 &&
                   to.dgate_stride % kN == 0;
  int64_t part_rows = 0;
  const cudaError_t error = VisitGate(args.gate_kind, [&]<CudaGate kGate>() {
    return VisitShape<T, 4>(fit, args.columns, [&]<typename S>() {
      return LaunchWalk<S, 3>(BackwardKernel<T, S, kGate>, args, stream, &part_rows, to);
    });
  });
  if (error != cudaSuccess || args.pass == NormPass::kSums) return error;
  // Shared weights also sum over the groups.
  const bool shared = args.weight_step == 0;
  return AddParts(to.scratch, part_rows * (shared ? args.groups : 1),
                  args.columns * (shared ? 1 : args.groups), to.dw, stream);
}

// A CTA has at most kBlockThreads / 32 rows where they are short, one where they are long.
int64_t CudaGatedNormScratch(int64_t groups, int64_t columns) {
  return std::max(kMostParts, groups) * (kBlockThreads / 32) * columns;
}

#define ANNULUS_INSTANTIATE(T)                                                                              \
  template cudaError_t CudaGatedNormForward(const CudaGatedNormArgs<T>&, T*, int64_t, cudaStream_t);        \
  template cudaError_t CudaGatedNormBackward(const CudaGatedNormArgs<T>&, const CudaGatedNormGradients<T>&, \
                                             cudaStream_t)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(__nv_bfloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
