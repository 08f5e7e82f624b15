// RMSNorm, each row in the registers of the threads that share it: one read, one write.
// Floors, elements moved per element of x: forward 2, with a residual 4, backward 4.

#include "kernels/common/parts.cuh"
#include "kernels/rms_norm/rms_norm_cuda.h"

namespace annulus::kernels {
namespace {

constexpr int kBlockThreads = 256;   // several small rows to a CTA
constexpr int kMaxRowThreads = 512;  // of one row: 128 registers each

// Backward threads of an SM: 1024 of 64 registers with one vector each, else 512 of 128. A row ahead in
// registers then keeps 48 KB in flight; a CTA more than are resident would be a second, nearly empty wave.
constexpr int ResidentThreads(int per_thread) { return per_thread == 1 ? 1024 : 512; }

// Sum over the blockDim.x threads of one row; the same bits in all of them.
//   part: [blockDim.y, blockDim.x / 32]. A second call needs another `part` or a barrier between.
__device__ float RowSum(float x, float* part) {
  x = WarpSum(x);
  if (blockDim.x == 32) return x;
  const int warps = blockDim.x / 32;
  part += threadIdx.y * warps;
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (int w = 0; w < warps; ++w) sum += part[w];
  return sum;
}

// Threads (x) of a row each hold V vectors; CTAs hold blockDim.y rows.
template <typename T, int N, int V>
__global__ void __launch_bounds__(kMaxRowThreads) ForwardKernel(const CudaRmsNormForwardArgs<T> args) {
  __shared__ float part[kMaxRowThreads / 32];
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int vectors = static_cast<int>(args.d / N);
  const int64_t start = row * args.d;
  const bool inside = row < args.tokens;
  Pack<T, N> x[V] = {}, w[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int vector = v * blockDim.x + threadIdx.x;
    if (inside && vector < vectors) x[v] = LoadPack<N>(args.x + start + vector * N);
  }
  if (args.residual != nullptr) {
    Pack<T, N> residual[V] = {};
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int vector = v * blockDim.x + threadIdx.x;
      if (inside && vector < vectors) residual[v] = LoadPack<N>(args.residual + start + vector * N);
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float sum[N];
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = x[v][i] + residual[v][i];
      x[v] = PackOf<T>(sum);
      const int vector = v * blockDim.x + threadIdx.x;
      if (inside && vector < vectors) StorePack<N>(x[v], args.sum + start + vector * N);
    }
  }
  float squares = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int vector = v * blockDim.x + threadIdx.x;
    if (vector < vectors) w[v] = LoadPack<N>(args.w + vector * N);
#pragma unroll
    for (int i = 0; i < N; ++i) squares += x[v][i] * x[v][i];
  }
  squares = RowSum(squares, part);
  const float inverse = rsqrtf(squares / static_cast<float>(args.d) + static_cast<float>(args.eps));
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int vector = v * blockDim.x + threadIdx.x;
    if (!inside || vector >= vectors) continue;
    float y[N];
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = w[v][i] * (x[v][i] * inverse);
    StorePack<N>(PackOf<T>(y), args.y + start + vector * N);
  }
}

// What one thread reads of a row.
template <typename T, int N, int V>
struct RowInput {
  Pack<T, N> x[V], dy[V], dx[V];
  __device__ void Load(const CudaRmsNormBackwardArgs<T>& args, int64_t row) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t column = int64_t{v * blockDim.x + threadIdx.x} * N;
      if (column >= args.d) continue;
      x[v] = LoadPack<N>(args.x + row * args.d + column);
      dy[v] = LoadPack<N>(args.dy + row * args.d + column);
    }
  }
  __device__ void LoadDx(const CudaRmsNormBackwardArgs<T>& args, int64_t row) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t column = int64_t{v * blockDim.x + threadIdx.x} * N;
      if (column < args.d) dx[v] = LoadPack<N>(static_cast<const T*>(args.dx + row * args.d + column));
    }
  }
};

// CTA b takes rows b, b + gridDim.x, ... and leaves its sum of dw in scratch[b, :].
// With r the inverse norm:  dx += r (w dy - x r^2 / d sum(w dy x))     dw += dy x r
template <typename T, int N, int V>
__global__ void __launch_bounds__(kMaxRowThreads, ResidentThreads(V) / kMaxRowThreads)
    BackwardKernel(const CudaRmsNormBackwardArgs<T> args) {
  __shared__ float2 part[2][kMaxRowThreads / 32];
  const int warps = blockDim.x / 32;
  Pack<T, N> w[V] = {};
  float dw[V][N] = {};
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int64_t column = int64_t{v * blockDim.x + threadIdx.x} * N;
    if (column < args.d) w[v] = LoadPack<N>(args.w + column);
  }
  // One row ahead where two rows fit in the registers.
  constexpr bool kAhead = V <= 2;
  RowInput<T, N, V> next = {};
  if (kAhead && blockIdx.x < args.tokens) {
    next.Load(args, blockIdx.x);
    next.LoadDx(args, blockIdx.x);
  }
  int parity = 0;  // two buffers: one barrier a row
  for (int64_t row = blockIdx.x; row < args.tokens; row += gridDim.x, parity ^= 1) {
    RowInput<T, N, V> in = next;
    if constexpr (!kAhead) {
      in.Load(args, row);
    } else if (row + gridDim.x < args.tokens) {
      next.Load(args, row + gridDim.x);
      next.LoadDx(args, row + gridDim.x);
    }
    float squares = 0, dot = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        squares += in.x[v][i] * in.x[v][i];
        dot += w[v][i] * in.dy[v][i] * in.x[v][i];
      }
    }
    squares = WarpSum(squares);
    dot = WarpSum(dot);
    if (threadIdx.x % 32 == 0) part[parity][threadIdx.x / 32] = {squares, dot};
    __syncthreads();
    squares = dot = 0;
    for (int i = 0; i < warps; ++i) {
      squares += part[parity][i].x;
      dot += part[parity][i].y;
    }
    if constexpr (!kAhead) in.LoadDx(args, row);
    const float inverse_d = 1.0f / static_cast<float>(args.d);
    const float inverse = rsqrtf(squares * inverse_d + static_cast<float>(args.eps));
    const float along = dot * inverse * inverse * inverse_d;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t column = int64_t{v * blockDim.x + threadIdx.x} * N;
      float dx[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        dx[i] = in.dx[v][i] + inverse * (w[v][i] * in.dy[v][i] - along * in.x[v][i]);
        dw[v][i] += in.dy[v][i] * (in.x[v][i] * inverse);
      }
      if (column < args.d) StorePack<N>(PackOf<T>(dx), args.dx + row * args.d + column);
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int64_t column = int64_t{v * blockDim.x + threadIdx.x} * N;
    if (column < args.d) StorePack<N>(PackOf<float>(dw[v]), args.scratch + blockIdx.x * args.d + column);
  }
}

// Threads of a row that hold V vectors each, whole warps.
int RowThreads(int64_t vectors, int per_thread) {
  return static_cast<int>(32 * std::max<int64_t>(1, CeilDiv(vectors, 32 * per_thread)));
}

// CTAs of the backward, and so partial sums of dw.
int64_t BackwardParts(int64_t tokens, int per_thread, int row_threads) {
  return std::min(tokens, int64_t{SmCount()} * (ResidentThreads(per_thread) / row_threads));
}

template <typename T, int N, int V>
cudaError_t LaunchForward(const CudaRmsNormForwardArgs<T>& args, cudaStream_t stream) {
  const int threads = RowThreads(args.d / N, V);
  if (threads > kMaxRowThreads) return cudaErrorInvalidValue;
  const int rows = std::max(1, kBlockThreads / threads);
  const int64_t blocks = CeilDiv(args.tokens, rows);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  ForwardKernel<T, N, V><<<static_cast<uint32_t>(blocks), dim3(threads, rows), 0, stream>>>(args);
  return cudaGetLastError();
}

template <typename T, int N, int V>
cudaError_t LaunchBackward(const CudaRmsNormBackwardArgs<T>& args, cudaStream_t stream) {
  const int threads = RowThreads(args.d / N, V);
  if (threads > kMaxRowThreads) return cudaErrorInvalidValue;
  if (args.tokens == 0 || args.d == 0) return cudaSuccess;
  const auto parts = static_cast<int>(BackwardParts(args.tokens, V, threads));
  BackwardKernel<T, N, V><<<parts, threads, 0, stream>>>(args);
  return AddParts(args.scratch, parts, args.d, args.dw, stream);
}

}  // namespace

template <typename T>
cudaError_t CudaRmsNormForward(const CudaRmsNormForwardArgs<T>& args, cudaStream_t stream) {
  constexpr int kN = kVectorElements<T>;
  const bool fit = args.d % kN == 0 && Aligned(args.x) && Aligned(args.w) && Aligned(args.y) &&
                   Aligned(args.residual) && Aligned(args.sum);
  if (!fit) return LaunchForward<T, 1, 8>(args, stream);
  const int64_t vectors = args.d / kN;
  if (vectors <= 32) return LaunchForward<T, kN, 1>(args, stream);
  if (vectors <= 64) return LaunchForward<T, kN, 2>(args, stream);
  if (vectors <= 4 * kMaxRowThreads) return LaunchForward<T, kN, 4>(args, stream);
  return LaunchForward<T, kN, 8>(args, stream);
}

template <typename T>
cudaError_t CudaRmsNormBackward(const CudaRmsNormBackwardArgs<T>& args, cudaStream_t stream) {
  constexpr int kN = kVectorElements<T>;
  const bool fit = args.d % kN == 0 && Aligned(args.x) && Aligned(args.w) && Aligned(args.dy) &&
                   Aligned(args.dx) && Aligned(args.scratch);
  if (!fit) return LaunchBackward<T, 1, 4>(args, stream);
  const int64_t vectors = args.d / kN;
  if (vectors <= kMaxRowThreads) return LaunchBackward<T, kN, 1>(args, stream);
  if (vectors <= 2 * kMaxRowThreads) return LaunchBackward<T, kN, 2>(args, stream);
  return LaunchBackward<T, kN, 4>(args, stream);
}

// parts * d: a part has at least 32 threads, and these hold at most 32 columns each.
int64_t CudaRmsNormScratch(int64_t d) {
  return int64_t{SmCount()} * std::min<int64_t>(d * (ResidentThreads(1) / 32), ResidentThreads(1) * 32);
}

template cudaError_t CudaRmsNormForward<float>(const CudaRmsNormForwardArgs<float>&, cudaStream_t);
template cudaError_t CudaRmsNormForward<__nv_bfloat16>(const CudaRmsNormForwardArgs<__nv_bfloat16>&,
                                                       cudaStream_t);
template cudaError_t CudaRmsNormBackward<float>(const CudaRmsNormBackwardArgs<float>&, cudaStream_t);
template cudaError_t CudaRmsNormBackward<__nv_bfloat16>(const CudaRmsNormBackwardArgs<__nv_bfloat16>&,
                                                        cudaStream_t);

}  // namespace annulus::kernels
