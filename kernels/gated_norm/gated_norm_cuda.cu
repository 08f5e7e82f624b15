// Gated RMSNorm, each group of a row in the registers of the threads that share it: one read, one write.
// Floors, elements moved per element of x: forward 3, backward 5. With
//   kSiluBefore  v = x a, up = w dy        else  v = x, up = w dy a          a = silu(gate) or sigmoid(gate)
// and r the inverse norm of v:   y = w x r a     dv = r (up - v r^2 mean(up v))     sum(up v) = sum(w dy x a)

#include "kernels/common/parts.cuh"
#include "kernels/gated_norm/gated_norm_cuda.h"

namespace annulus::kernels {
namespace {

constexpr int kBlockThreads = 128;   // several short rows to a CTA
constexpr int kMaxRowThreads = 512;  // of one row

// bf16 keeps 8 bits: the special-function units' 21 suffice there, and f32 gets the library's.
template <typename T>
__device__ float Sigmoid(float x) {
  if constexpr (sizeof(T) == 2) return __fdividef(1.0f, 1.0f + __expf(-x));
  return 1.0f / (1.0f + expf(-x));
}

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

// Threads of the largest CTA, and CTAs of that size for whose threads an SM has registers. Rows of three
// vectors a thread are a warp's.
constexpr int MostThreads(int per_thread) { return per_thread == 3 ? kBlockThreads : kMaxRowThreads; }
constexpr int LeastCtas(int per_thread) { return per_thread == 1 ? 2 : per_thread == 3 ? 4 : 1; }
// Sigmoids are kept from the sums to what needs them where there are registers for them.
constexpr bool KeepsSigmoids(int per_thread) { return per_thread == 3; }

// The sigmoids of a row's gates, kept or computed again.
template <typename T, int N, int V>
struct Sigmoids {
  static constexpr bool kKept = KeepsSigmoids(V);
  float kept[kKept ? V : 1][N];
  __device__ void Keep(int v, int i, float sigmoid) {
    if constexpr (kKept) kept[v][i] = sigmoid;
  }
  __device__ float At(int v, int i, float gate) const {
    if constexpr (kKept) return kept[v][i];
    return Sigmoid<T>(gate);
  }
};

template <typename T, int N, int V, CudaGate kGate>
__global__ void __launch_bounds__(MostThreads(V), LeastCtas(V))
    ForwardKernel(const CudaGatedNormArgs<T> args, T* __restrict__ out, int64_t out_stride) {
  constexpr bool kBefore = kGate == CudaGate::kSiluBefore;
  __shared__ float2 part[kMaxRowThreads / 32];
  const int64_t token = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, group = blockIdx.y;
  const bool inside = token < args.tokens;
  const int64_t columns = inside ? args.columns : 0, first = group * args.columns;
  RowPart<T, N, V> x = {}, gate = {};
  x.Load(args.x + token * args.x_stride + first, columns);
  gate.Load(args.gate + token * args.gate_stride + first, columns);
  Sigmoids<T, N, V> sigmoids;
  float squares = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float in_gate = gate.pack[v][i], sigmoid = Sigmoid<T>(in_gate);
      sigmoids.Keep(v, i, sigmoid);
      const float normed = kBefore ? x.pack[v][i] * Activation<kGate>(in_gate, sigmoid) : x.pack[v][i];
      squares += normed * normed;
    }
  }
  if (args.pass != NormPass::kFinish) squares = RowSums({squares, 0}, part).x;
  if (args.pass == NormPass::kSums) {
    if (inside && threadIdx.x == 0) args.sums[token * args.groups + group] = squares;
    return;
  }
  if (args.pass == NormPass::kFinish && inside) squares = args.sums[token * args.groups + group];
  const float inverse = InverseNorm(args, squares);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int64_t column = int64_t{v * blockDim.x + threadIdx.x} * N;
    if (column >= columns) continue;
    const Pack<T, N> w = LoadPack<N>(args.w + group * args.weight_step + column);
    float y[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float in_gate = gate.pack[v][i];
      y[i] = w[i] * (x.pack[v][i] * inverse) * Activation<kGate>(in_gate, sigmoids.At(v, i, in_gate));
    }
    StorePack<N>(PackOf<T>(y), out + token * out_stride + first + column);
  }
}

// What one thread reads of a row of the backward.
template <typename T, int N, int V>
struct RowInput {
  RowPart<T, N, V> x, gate, dy;
  __device__ void Load(const CudaGatedNormArgs<T>& args, const CudaGatedNormGradients<T>& to, int64_t token,
                       int64_t first) {
    const int64_t columns = token < args.tokens ? args.columns : 0;
    x.Load(args.x + token * args.x_stride + first, columns);
    gate.Load(args.gate + token * args.gate_stride + first, columns);
    dy.Load(to.dy + token * to.dy_stride + first, columns);
  }
};

// CTA (part, group) takes every gridDim.x-th blockDim.y tokens; row y of it leaves its sum of dw in
// scratch[part * blockDim.y + y, group, :].
template <typename T, int N, int V, CudaGate kGate>
__global__ void __launch_bounds__(MostThreads(V), LeastCtas(V))
    BackwardKernel(const CudaGatedNormArgs<T> args, const CudaGatedNormGradients<T> to) {
  constexpr bool kBefore = kGate == CudaGate::kSiluBefore;
  __shared__ float2 part[2][kMaxRowThreads / 32];
  const int64_t group = blockIdx.y, first = group * args.columns;
  RowPart<T, N, V> w = {};
  w.Load(args.w + group * args.weight_step, args.columns);
  float dw[V][N] = {};
  const int64_t step = int64_t{gridDim.x} * blockDim.y;
  constexpr bool kAhead = V <= 2;  // a row ahead where two rows fit in the registers
  RowInput<T, N, V> next = {};
  if (kAhead) next.Load(args, to, int64_t{blockIdx.x} * blockDim.y + threadIdx.y, first);
  int parity = 0;  // two buffers: one barrier a row
  for (int64_t begin = int64_t{blockIdx.x} * blockDim.y; begin < args.tokens; begin += step, parity ^= 1) {
    const int64_t token = begin + threadIdx.y;
    const bool inside = token < args.tokens;
    const int64_t columns = inside ? args.columns : 0;
    RowInput<T, N, V> in = next;
    if constexpr (!kAhead) {
      in.Load(args, to, token, first);
    } else if (begin + step < args.tokens) {
      next.Load(args, to, token + step, first);
    }
    float2 sums = {0, 0};  // squares, dot
    Sigmoids<T, N, V> sigmoids;
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float gate = in.gate.pack[v][i], sigmoid = Sigmoid<T>(gate);
        sigmoids.Keep(v, i, sigmoid);
        const float value = in.x.pack[v][i] * Activation<kGate>(gate, sigmoid);
        const float normed = kBefore ? value : in.x.pack[v][i];
        sums.x += normed * normed;
        sums.y += w.pack[v][i] * in.dy.pack[v][i] * value;
      }
    }
    float* given = args.sums + token * 2 * args.groups + group;
    if (args.pass != NormPass::kFinish) {
      sums = RowSums(sums, part[parity]);
    } else if (inside) {
      sums = {given[0], given[args.groups]};
    }
    if (args.pass == NormPass::kSums) {
      if (inside && threadIdx.x == 0) given[0] = sums.x, given[args.groups] = sums.y;
      continue;
    }
    const float inverse = InverseNorm(args, sums.x);
    const float along = sums.y * inverse * inverse / static_cast<float>(args.group_columns);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t column = int64_t{v * blockDim.x + threadIdx.x} * N;
      float dx[N], dgate[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float gate = in.gate.pack[v][i], s = sigmoids.At(v, i, gate), a = Activation<kGate>(gate, s);
        const float x = in.x.pack[v][i], dy = in.dy.pack[v][i], weighted = w.pack[v][i] * dy;
        const float dv = inverse * ((kBefore ? weighted : weighted * a) - along * (kBefore ? x * a : x));
        dw[v][i] += dy * (x * a * inverse);
        dx[i] = kBefore ? dv * a : dv;
        dgate[i] = (kBefore ? dv * x : weighted * (x * inverse)) * Slope<kGate>(gate, s);
      }
      if (column >= columns) continue;
      StorePack<N>(PackOf<T>(dx), to.dx + token * to.dx_stride + first + column);
      StorePack<N>(PackOf<T>(dgate), to.dgate + token * to.dgate_stride + first + column);
    }
  }
  if (args.pass == NormPass::kSums) return;
  const int64_t own = (int64_t{blockIdx.x} * blockDim.y + threadIdx.y) * args.groups + group;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int64_t column = int64_t{v * blockDim.x + threadIdx.x} * N;
    if (column < args.columns) StorePack<N>(PackOf<float>(dw[v]), to.scratch + own * args.columns + column);
  }
}

// Threads of a row that hold V vectors each, whole warps.
int RowThreads(int64_t vectors, int per_thread) {
  return static_cast<int>(32 * std::max<int64_t>(1, CeilDiv(vectors, 32 * per_thread)));
}

constexpr int64_t kMostParts = 2048;  // of all groups together, unless there are more groups

// CTAs of a group: together what is resident at once.
template <typename Kernel>
int64_t BackwardParts(Kernel kernel, int threads, int64_t groups) {
  int resident = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, 0);
  const int64_t ctas = std::min(int64_t{SmCount()} * std::max(resident, 1), kMostParts);
  return std::max<int64_t>(1, ctas / groups);
}

template <typename T, int N, int V, CudaGate kGate>
cudaError_t LaunchForward(const CudaGatedNormArgs<T>& args, T* y, int64_t y_stride, cudaStream_t stream) {
  const int threads = RowThreads(args.columns / N, V);
  if (threads > kMaxRowThreads) return cudaErrorInvalidValue;
  const int rows = std::max(1, kBlockThreads / threads);
  const int64_t blocks = CeilDiv(args.tokens, rows);
  if (blocks > INT32_MAX || args.groups > UINT16_MAX) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  const dim3 grid(static_cast<uint32_t>(blocks), static_cast<uint32_t>(args.groups));
  ForwardKernel<T, N, V, kGate><<<grid, dim3(threads, rows), 0, stream>>>(args, y, y_stride);
  return cudaGetLastError();
}

template <typename T, int N, int V, CudaGate kGate>
cudaError_t LaunchBackward(const CudaGatedNormArgs<T>& args, const CudaGatedNormGradients<T>& to,
                           cudaStream_t stream) {
  const int threads = RowThreads(args.columns / N, V);
  if (threads > kMaxRowThreads || args.groups > UINT16_MAX) return cudaErrorInvalidValue;
  if (args.tokens == 0 || args.columns == 0) return cudaSuccess;
  const int rows = std::max(1, kBlockThreads / threads);
  const int64_t parts = BackwardParts(BackwardKernel<T, N, V, kGate>, threads * rows, args.groups);
  const dim3 grid(static_cast<uint32_t>(parts), static_cast<uint32_t>(args.groups));
  BackwardKernel<T, N, V, kGate><<<grid, dim3(threads, rows), 0, stream>>>(args, to);
  if (args.pass == NormPass::kSums) return cudaGetLastError();
  // Shared weights also sum over the groups.
  const bool shared = args.weight_step == 0;
  return AddParts(to.scratch, parts * rows * (shared ? args.groups : 1),
                  args.columns * (shared ? 1 : args.groups), to.dw, stream);
}

// Calls fn<N, V>() with vectors as wide as the rows allow and as many to a thread as leave enough threads
// resident: forward a warp takes a row where that is possible, backward a thread holds more of each vector.
template <typename T, typename Fn>
cudaError_t VisitForward(bool vectors_fit, int64_t columns, Fn&& fn) {
  constexpr int kN = kVectorElements<T>;
  if (!vectors_fit) return fn.template operator()<1, 8>();
  const int64_t vectors = columns / kN;
  if (vectors <= 32) return fn.template operator()<kN, 1>();
  if (vectors <= 64) return fn.template operator()<kN, 2>();
  if (vectors <= 96) return fn.template operator()<kN, 3>();
  if (vectors <= 2 * kMaxRowThreads) return fn.template operator()<kN, 2>();
  if (vectors <= 4 * kMaxRowThreads) return fn.template operator()<kN, 4>();
  return fn.template operator()<kN, 8>();
}
template <typename T, typename Fn>
cudaError_t VisitBackward(bool vectors_fit, int64_t columns, Fn&& fn) {
  constexpr int kN = kVectorElements<T>;
  if (!vectors_fit) return fn.template operator()<1, 4>();
  const int64_t vectors = columns / kN;
  if (vectors <= kMaxRowThreads) return fn.template operator()<kN, 1>();
  if (vectors <= 2 * kMaxRowThreads) return fn.template operator()<kN, 2>();
  return fn.template operator()<kN, 4>();
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
  const bool fit = VectorsFit(args) && Aligned(y) && y_stride % kVectorElements<T> == 0;
  return VisitGate(args.gate_kind, [&]<CudaGate kGate>() {
    return VisitForward<T>(fit, args.columns, [&]<int N, int V>() {
      return LaunchForward<T, N, V, kGate>(args, y, y_stride, stream);
    });
  });
}

template <typename T>
cudaError_t CudaGatedNormBackward(const CudaGatedNormArgs<T>& args, const CudaGatedNormGradients<T>& to,
                                  cudaStream_t stream) {
  constexpr int kN = kVectorElements<T>;
  const bool fit = VectorsFit(args) && Aligned(to.dy) && Aligned(to.dx) && Aligned(to.dgate) &&
                   Aligned(to.scratch) && to.dy_stride % kN == 0 && to.dx_stride % kN == 0 &&
                   to.dgate_stride % kN == 0;
  return VisitGate(args.gate_kind, [&]<CudaGate kGate>() {
    return VisitBackward<T>(fit, args.columns,
                            [&]<int N, int V>() { return LaunchBackward<T, N, V, kGate>(args, to, stream); });
  });
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
