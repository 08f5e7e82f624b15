// Gated RMSNorm, each group of a row in the registers of the threads that share it: one read, one write. With
//   kSiluBefore  v = x a, up = w dy        else  v = x, up = w dy a          a = silu(gate) or sigmoid(gate)
// and r the inverse norm of v:   y = w x r a     dv = r (up - v r^2 mean(up v))     sum(up v) = sum(w dy x a)
//
// CTAs stay and walk along rows; a row's reads begin while those before it are worked on, and arrive through
// shared memory, of which each thread has a ring of its own: registers would not hold enough of them.
// Floors, elements moved per element of x: forward 3, backward 5.

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
template <CudaGate kGate>
__device__ float Slope(float gate, float sigmoid) {
  const float slope = sigmoid * (1.0f - sigmoid);
  return kGate == CudaGate::kSigmoidAfter ? slope : sigmoid + gate * slope;
}

// Sums over the blockDim.x threads of a row, the same bits in all of them.
//   part: [blockDim.y, blockDim.x / 32]; its next use is two calls later
__device__ float2 RowSums(float2 x, float2* part) {
  x = {WarpSum(x.x), WarpSum(x.y)};
  if (blockDim.x == 32) return x;
  const int warps = blockDim.x / 32;
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

template <typename T>
__device__ float InverseNorm(const CudaGatedNormArgs<T>& args, float squares) {
  return rsqrtf(squares / static_cast<float>(args.group_columns) + static_cast<float>(args.eps));
}

// What a thread holds of a row: V vectors, blockDim.x apart.
template <typename T, int N, int V>
struct RowPart {
  Pack<T, N> pack[V];
  __device__ void Load(const T* row, int64_t columns) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t column = int64_t{v * blockDim.x + threadIdx.x} * N;
      if (column < columns) pack[v] = LoadPack<N>(row + column);
    }
  }
};

// How a row's vectors lie in threads: N elements each, V to a thread; kThreads: of a CTA at most. A warp
// takes a row where it can, and then several warps make a CTA.
template <int kElements, int kVectors, int kMostThreads>
struct RowShape {
  static constexpr int N = kElements, V = kVectors, kThreads = kMostThreads;
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
  // One row of the ring.
  struct Row {
    const RowRing& ring;
    int index;  // of this thread's, in order from 0
    int64_t token;
    // Zeros past the last token and column.
    __device__ Pack<T, N> Load(int operand, int v) const {
      if (!ring.Holds(token, v)) return {};
      return LoadPack<N>(kCopies ? static_cast<const T*>(ring.Slot(index, operand, v))
                                 : ring.At(operand, token, v));
    }
  };

  __device__ RowRing(char* shared, int64_t tokens, int64_t columns, const Operand (&operands)[kOperands])
      : slots_(shared + (threadIdx.y * blockDim.x + threadIdx.x) * 16), tokens_(tokens), columns_(columns) {
#pragma unroll
    for (int i = 0; i < kOperands; ++i) operands_[i] = operands[i];
  }

  // In order; each row takes the place of the one kStages before it.
  __device__ void Start(const Row& row) const {
    if constexpr (kCopies) {
#pragma unroll
      for (int operand = 0; operand < kOperands; ++operand) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (!Holds(row.token, v)) continue;
          CopyAsync16(SharedAddress(Slot(row.index, operand, v)), At(operand, row.token, v));
        }
      }
      CopyAsyncCommit();
    }
  }
  // For the oldest row that was started and not waited for.
  __device__ void Wait() const {
    if constexpr (kCopies) CopyAsyncWait<kStages - 2>();
  }

 private:
  __device__ static int64_t Column(int v) { return int64_t{v * blockDim.x + threadIdx.x} * N; }
  __device__ bool Holds(int64_t token, int v) const { return token < tokens_ && Column(v) < columns_; }
  __device__ const T* At(int operand, int64_t token, int v) const {
    return operands_[operand].first + token * operands_[operand].stride + Column(v);
  }
  __device__ T* Slot(int row, int operand, int v) const {
    const int vector = (row % kStages * kOperands + operand) * V + v;
    return reinterpret_cast<T*>(slots_ + vector * static_cast<int>(blockDim.x * blockDim.y) * 16);
  }

  char* const slots_;
  const int64_t tokens_, columns_;
  Operand operands_[kOperands];
};

// Calls fn(row) for every gridDim.x-th blockDim.y tokens, the same number of times in all threads of the CTA.
template <typename Ring, typename Fn>
__device__ void WalkRows(const Ring& ring, int64_t tokens, const Fn& fn) {
  const int64_t step = int64_t{gridDim.x} * blockDim.y;
  typename Ring::Row row{ring, 0, int64_t{blockIdx.x} * blockDim.y + threadIdx.y};
  const auto ahead = [&](int rows) {
    return typename Ring::Row{ring, row.index + rows, row.token + rows * step};
  };
#pragma unroll
  for (int i = 0; i < Ring::kStages - 1; ++i) ring.Start(ahead(i));
  for (int64_t begin = int64_t{blockIdx.x} * blockDim.y; begin < tokens; begin += step) {
    ring.Wait();
    ring.Start(ahead(Ring::kStages - 1));
    fn(row);
    ++row.index;
    row.token += step;
  }
}

// CTAs (part, group) take rows as WalkRows does.
template <typename T, typename S, CudaGate kGate>
__global__ void __launch_bounds__(S::kThreads, kForwardCtas<S>)
    ForwardKernel(const __grid_constant__ CudaGatedNormArgs<T> args, T* __restrict__ out,
                  int64_t out_stride) {
  constexpr int N = S::N, V = S::V;
  constexpr bool kBefore = kGate == CudaGate::kSiluBefore;
  using Ring = RowRing<T, S, 2>;
  __shared__ float2 part[2][S::kThreads / 32];
  extern __shared__ uint4 ring_memory[];
  const int64_t group = blockIdx.y, first = group * args.columns;
  RowPart<T, N, V> w = {};
  w.Load(args.w + group * args.weight_step, args.columns);
  const Ring ring(reinterpret_cast<char*>(ring_memory), args.tokens, args.columns,
                  {{args.x + first, args.x_stride}, {args.gate + first, args.gate_stride}});
  int parity = 0;  // two buffers: one barrier a row
  WalkRows(ring, args.tokens, [&](const typename Ring::Row& row) {
    const int64_t token = row.token;
    const bool inside = token < args.tokens;
    float value[V][N];  // x a
    float squares = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Pack<T, N> x = row.Load(0, v), gate = row.Load(1, v);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        value[v][i] = x[i] * Activation<kGate>(gate[i], Sigmoid<T>(gate[i]));
        const float normed = kBefore ? value[v][i] : x[i];
        squares += normed * normed;
      }
    }
    float* given = args.sums + token * args.groups + group;
    if (args.pass != NormPass::kFinish) squares = RowSums({squares, 0}, part[parity]).x;
    parity ^= 1;
    if (args.pass == NormPass::kSums) {
      if (inside && threadIdx.x == 0) *given = squares;
      return;
    }
    if (args.pass == NormPass::kFinish && inside) squares = *given;
    const float inverse = InverseNorm(args, squares);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t column = int64_t{v * blockDim.x + threadIdx.x} * N;
      if (!inside || column >= args.columns) continue;
      float y[N];
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] = w.pack[v][i] * (value[v][i] * inverse);
      StorePack<N>(PackOf<T>(y), out + token * out_stride + first + column);
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
  using Ring = RowRing<T, S, 3>;
  __shared__ float2 part[2][S::kThreads / 32];
  extern __shared__ uint4 ring_memory[];
  const int64_t group = blockIdx.y, first = group * args.columns;
  RowPart<T, N, V> w = {};
  w.Load(args.w + group * args.weight_step, args.columns);
  float dw[V][N] = {};
  const Ring ring(reinterpret_cast<char*>(ring_memory), args.tokens, args.columns,
                  {{args.x + first, args.x_stride},
                   {args.gate + first, args.gate_stride},
                   {to.dy + first, to.dy_stride}});
  int parity = 0;  // two buffers: one barrier a row
  WalkRows(ring, args.tokens, [&](const typename Ring::Row& row) {
    const int64_t token = row.token;
    const bool inside = token < args.tokens;
    float2 sums = {0, 0};  // squares, dot
    Sigmoids<T, S> sigmoids;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Pack<T, N> x = row.Load(0, v), gate = row.Load(1, v), dy = row.Load(2, v);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float sigmoid = Sigmoid<T>(gate[i]);
        sigmoids.Keep(v, i, sigmoid);
        const float value = x[i] * Activation<kGate>(gate[i], sigmoid);
        const float normed = kBefore ? value : x[i];
        sums.x += normed * normed;
        sums.y += w.pack[v][i] * dy[i] * value;
      }
    }
    float* given = args.sums + token * 2 * args.groups + group;
    if (args.pass != NormPass::kFinish) {
      sums = RowSums(sums, part[parity]);
    } else if (inside) {
      sums = {given[0], given[args.groups]};
    }
    parity ^= 1;
    if (args.pass == NormPass::kSums) {
      if (inside && threadIdx.x == 0) given[0] = sums.x, given[args.groups] = sums.y;
      return;
    }
    const float inverse = InverseNorm(args, sums.x);
    const float along = sums.y * inverse * inverse / static_cast<float>(args.group_columns);
    asm volatile("" ::: "memory");  // the row is read again: held, it would leave too few registers
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t column = int64_t{v * blockDim.x + threadIdx.x} * N;
      const Pack<T, N> xs = row.Load(0, v), gates = row.Load(1, v), dys = row.Load(2, v);
      float dx[N], dgate[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float gate = gates[i], s = sigmoids.At(v, i, gate), a = Activation<kGate>(gate, s);
        const float x = xs[i], dy = dys[i], weighted = w.pack[v][i] * dy;
        const float dv = inverse * ((kBefore ? weighted : weighted * a) - along * (kBefore ? x * a : x));
        dw[v][i] += dy * (x * a * inverse);
        dx[i] = kBefore ? dv * a : dv;
        dgate[i] = (kBefore ? dv * x : weighted * (x * inverse)) * Slope<kGate>(gate, s);
      }
      if (!inside || column >= args.columns) continue;
      StorePack<N>(PackOf<T>(dx), to.dx + token * to.dx_stride + first + column);
      StorePack<N>(PackOf<T>(dgate), to.dgate + token * to.dgate_stride + first + column);
    }
  });
  if (args.pass == NormPass::kSums) return;
  const int64_t own = (int64_t{blockIdx.x} * blockDim.y + threadIdx.y) * args.groups + group;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int64_t column = int64_t{v * blockDim.x + threadIdx.x} * N;
    if (column < args.columns) StorePack<N>(PackOf<float>(dw[v]), to.scratch + own * args.columns + column);
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
