// Gated RMSNorm, each group of a row in the registers of the threads that share it: one read, one write. With
//   kSiluBefore  v = x a, up = w dy        else  v = x, up = w dy a          a = silu(gate) or sigmoid(gate)
// and r the inverse norm of v:   y = w x r a     dv = r (up - v r^2 mean(up v))     sum(up v) = sum(w dy x a)
//
// CTAs stay and walk along rows; a row's reads begin while those before it are worked on, and arrive through
// shared memory, of which each thread has a ring of its own: registers would not hold enough of them.
// Floors, elements moved per element of x: forward 3, backward 5. Both run at memory speed (on H200 94% and
// 91% of a copy's); the backward issues 42 instructions an element, 0.6 of what its memory takes.

#include "kernels/common/async_copy.cuh"
#include "kernels/common/parts.cuh"
#include "kernels/common/sigmoid.cuh"
#include "kernels/gated_norm/gated_norm_cuda.h"

namespace annulus::kernels {
namespace {

constexpr int kBlockThreads = 128;   // several short rows to a CTA
constexpr int kPairThreads = 320;    // of one row, two such CTAs to an SM
constexpr int kMaxRowThreads = 512;  // of one row

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

// How a row's vectors lie in threads: N elements each, V to a thread; kThreads: of a CTA at most. A warp
// takes a row where it can, and then several warps make a CTA.
template <int kElements, int kVectors, int kMostThreads>
struct RowShape {
  static constexpr int N = kElements, V = kVectors, kThreads = kMostThreads;
  // Of one row: blockDim.x, which is known where a warp takes it.
  static __device__ int RowThreads() { return kThreads == kBlockThreads ? 32 : static_cast<int>(blockDim.x); }
  static __device__ int64_t Column(int v) {
    return int64_t{v * RowThreads() + static_cast<int>(threadIdx.x)} * N;
  }
  // Whether the row has this thread's vector v: all but the last are whole wherever elements come in vectors.
  static __device__ bool Has(int v, int64_t columns) { return (N > 1 && v < V - 1) || Column(v) < columns; }
};
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

// Sums over the threads of a row, the same bits in all of them.
//   part: [blockDim.y, blockDim.x / 32]; its next use is two calls later
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

// What a thread holds of a row: V vectors, zeros where the row has none.
template <typename T, typename S>
struct RowPart {
  Pack<T, S::N> pack[S::V] = {};
  __device__ RowPart(const T* row, int64_t columns) {
#pragma unroll
    for (int v = 0; v < S::V; ++v) {
      if (S::Has(v, columns)) pack[v] = LoadPack<S::N>(row + S::Column(v));
    }
  }
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

// What one thread reads of the rows of some operands, kStages - 1 rows ahead; where elements go one by one,
// or a ring would take too much memory, when they are taken. A thread reads only what it has copied itself.
template <typename T, typename S, int kOperands>
class RowRing {
 public:
  static constexpr int N = S::N, V = S::V;
  static constexpr bool kCopies = N > 1 && V <= 4;
  static constexpr int kStages = V <= 3 ? 3 : 2;
  static constexpr int kThreadBytes = kCopies ? kStages * kOperands * V * 16 : 0;
  struct Operand {
    const T* first;  // of this thread's group in the first row
    int64_t stride;
  };

  __device__ RowRing(void* shared, int64_t tokens, int64_t columns, const Operand (&operands)[kOperands])
      : slots_(static_cast<char*>(shared) + (threadIdx.y * S::RowThreads() + threadIdx.x) * 16),
        tokens_(tokens),
        columns_(columns) {
#pragma unroll
    for (int i = 0; i < kOperands; ++i) operands_[i] = operands[i];
  }

  // Into a stage, which takes the place of what is there.
  __device__ void Start(int stage, int64_t token) const {
    if constexpr (kCopies) {
#pragma unroll
      for (int operand = 0; operand < kOperands; ++operand) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          CopyAsync16(SharedAddress(Slot(stage, operand, v)), At(operand, token) + S::Column(v),
                      token < tokens_ && S::Has(v, columns_));
        }
      }
      CopyAsyncCommit();
    }
  }
  // For the oldest row that was started and not waited for.
  __device__ void Wait() const {
    if constexpr (kCopies) CopyAsyncWait<kStages - 2>();
  }
  // Zeros past the last token and column.
  __device__ Pack<T, N> Load(int stage, int64_t token, int operand, int v) const {
    if constexpr (kCopies) return LoadPack<N>(reinterpret_cast<const T*>(Slot(stage, operand, v)));
    if (token >= tokens_ || !S::Has(v, columns_)) return {};
    return LoadPack<N>(At(operand, token) + S::Column(v));
  }

 private:
  __device__ const T* At(int operand, int64_t token) const {
    return operands_[operand].first + token * operands_[operand].stride;
  }
  __device__ char* Slot(int stage, int operand, int v) const {
    const int rows = S::kThreads == kBlockThreads ? kBlockThreads / 32 : static_cast<int>(blockDim.y);
    return slots_ + ((stage * kOperands + operand) * V + v) * S::RowThreads() * rows * 16;
  }

  char* const slots_;
  const int64_t tokens_, columns_;
  Operand operands_[kOperands];
};

// Calls fn(token, load) for every gridDim.x-th blockDim.y tokens, the same number of times in all threads of
// the CTA; load(operand, v): this thread's vector of it, zeros past the last token.
template <typename Ring, typename Fn>
__device__ void WalkRows(const Ring& ring, int64_t tokens, const Fn& fn) {
  const int64_t step = int64_t{gridDim.x} * blockDim.y;
  int64_t token = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
#pragma unroll
  for (int stage = 0; stage < Ring::kStages - 1; ++stage) ring.Start(stage, token + stage * step);
  int stage = 0, last = Ring::kStages - 1;
  for (int64_t begin = int64_t{blockIdx.x} * blockDim.y; begin < tokens; begin += step, token += step) {
    ring.Wait();
    ring.Start(last, token + (Ring::kStages - 1) * step);
    fn(token, [&](int operand, int v) { return ring.Load(stage, token, operand, v); });
    last = stage;
    stage = stage + 1 < Ring::kStages ? stage + 1 : 0;
  }
}

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
  const int64_t vectors = CeilDiv(args.columns, S::N);
  const auto threads = static_cast<int>(32 * CeilDiv(vectors, 32 * S::V));
  if (threads > S::kThreads || args.groups > UINT16_MAX) return cudaErrorInvalidValue;
  const int rows = std::max(1, kBlockThreads / threads);
  const int shared = threads * rows * RowRing<T, S, kOperands>::kThreadBytes;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  int resident = 0;
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads * rows,
                                                          static_cast<size_t>(shared));
  }
  if (error != cudaSuccess) return error;
  const int64_t ctas = std::min(int64_t{SmCount()} * std::max(resident, 1), kMostParts);
  const int64_t parts = std::clamp<int64_t>(ctas / args.groups, 1, CeilDiv(args.tokens, rows));
  *part_rows = parts * rows;
  const dim3 grid(static_cast<uint32_t>(parts), static_cast<uint32_t>(args.groups));
  kernel<<<grid, dim3(threads, rows), static_cast<size_t>(shared), stream>>>(args, to...);
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
