// RMSNorm: one read, one write. The forward has each row in the registers of the threads that share it; in
// the backward CTAs walk along rows that arrive through rings in shared memory, and keep sums of dw. (A
// forward that walks is slower: its CTAs drift apart, and with them the rows that are read and written at a
// time.) Floors, elements moved per element of x: forward 2, with a residual 4, backward 4.

#include "kernels/common/row_walk.cuh"
#include "kernels/rms_norm/rms_norm_cuda.h"

namespace annulus::kernels {
namespace {

// CTAs for whose threads an SM has registers. Of the forward: 64 bytes a thread on their way, of 1024.
template <typename S>
constexpr int kForwardCtas = S::V <= 4 ? 1024 / S::kThreads : 1;
template <typename S>
constexpr int kBackwardCtas = S::kThreads == kBlockThreads  ? 4
                              : S::kThreads <= kPairThreads ? 2
                                                            : 1;

template <typename T>
__device__ float InverseNorm(float squares, const T& args) {
  return rsqrtf(squares / static_cast<float>(args.d) + static_cast<float>(args.eps));
}

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, kForwardCtas<S>)
    ForwardKernel(const __grid_constant__ CudaRmsNormForwardArgs<T> args) {
  constexpr int N = S::N, V = S::V;
  __shared__ float part[S::kThreads / 32];
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, start = row * args.d;
  const auto has = [&](int v) { return row < args.tokens && S::Column(v) < args.d; };
  Pack<T, N> x[V] = {};
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (has(v)) x[v] = LoadPack<N>(args.x + start + S::Column(v));
  }
  if (args.residual != nullptr) {
    Pack<T, N> residual[V] = {};
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (has(v)) residual[v] = LoadPack<N>(args.residual + start + S::Column(v));
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float sum[N];
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = x[v][i] + residual[v][i];
      x[v] = PackOf<T>(sum);
      if (has(v)) StorePack<N>(x[v], args.sum + start + S::Column(v));
    }
  }
  float squares = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int i = 0; i < N; ++i) squares = fmaf(x[v][i], x[v][i], squares);
  }
  const float inverse = InverseNorm(RowSum<S>(squares, part), args);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (!has(v)) continue;
    const Pack<T, N> w = LoadPack<N>(args.w + S::Column(v));
    float y[N];
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = w[i] * (x[v][i] * inverse);
    StorePack<N>(PackOf<T>(y), args.y + start + S::Column(v));
  }
}

template <typename S, typename T>
cudaError_t LaunchForward(const CudaRmsNormForwardArgs<T>& args, cudaStream_t stream) {
  const dim3 threads = RowThreadsOf<S>(args.d);
  if (threads.x == 0) return cudaErrorInvalidValue;
  const int64_t blocks = CeilDiv(args.tokens, threads.y);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  ForwardKernel<T, S><<<static_cast<uint32_t>(blocks), threads, 0, stream>>>(args);
  return cudaGetLastError();
}

// Row y of CTA b leaves its sum of dw in scratch[b * blockDim.y + y, :]. With r the inverse norm:
//   dx += r (w dy - x r^2 / d sum(w dy x))     dw += dy x r
template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, kBackwardCtas<S>)
    BackwardKernel(const __grid_constant__ CudaRmsNormBackwardArgs<T> args) {
  constexpr int N = S::N, V = S::V;
  __shared__ float2 part[2][S::kThreads / 32];
  extern __shared__ uint4 ring_memory[];
  const RowRing<T, S, 3> ring(ring_memory, args.tokens, args.d,
                              {{args.x, args.d}, {args.dy, args.d}, {args.dx, args.d}});
  const RowPart<T, S> w(args.w, args.d);
  float dw[V][N] = {};
  int parity = 0;  // two buffers: one barrier a row
  WalkRows(ring, args.tokens, [&](int64_t token, const auto& load) {
    float2 sums = {0, 0};  // squares, dot
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Pack<T, N> x = load(0, v), dy = load(1, v);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sums.x = fmaf(x[i], x[i], sums.x);
        sums.y = fmaf(w.pack[v][i] * dy[i], x[i], sums.y);
      }
    }
    sums = RowSum<S>(sums, part[parity]);
    parity ^= 1;
    if (token >= args.tokens) return;
    const float inverse = InverseNorm(sums.x, args);
    const float along = sums.y * inverse * inverse / static_cast<float>(args.d);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Pack<T, N> x = load(0, v), dy = load(1, v), before = load(2, v);
      float dx[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        dx[i] = before[i] + inverse * (w.pack[v][i] * dy[i] - along * x[i]);
        dw[v][i] = fmaf(dy[i], x[i] * inverse, dw[v][i]);
      }
      if (S::Has(v, args.d)) StorePack<N>(PackOf<T>(dx), args.dx + token * args.d + S::Column(v));
    }
  });
  float* own = args.scratch + (int64_t{blockIdx.x} * blockDim.y + threadIdx.y) * args.d;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (S::Has(v, args.d)) StorePack<N>(PackOf<float>(dw[v]), own + S::Column(v));
  }
}

// Most rows that an SM works on in the backward, and so partial sums of dw: 128 KB of them.
int64_t BackwardRowsOfSm(int64_t d) { return std::clamp<int64_t>(32768 / std::max<int64_t>(d, 1), 1, 32); }

template <typename S, typename T>
cudaError_t LaunchBackward(const CudaRmsNormBackwardArgs<T>& args, cudaStream_t stream) {
  const auto kernel = BackwardKernel<T, S>;
  RingCtas cta;
  const cudaError_t error = PlanRingCtas<S, RowRing<T, S, 3>>(kernel, args.d, &cta);
  if (error != cudaSuccess) return error;
  const int64_t rows = cta.threads.y;
  const int64_t of_sm = std::clamp<int64_t>(BackwardRowsOfSm(args.d) / rows, 1, std::max(cta.resident, 1));
  const int64_t blocks = std::min(SmCount() * of_sm, CeilDiv(args.tokens, rows));
  kernel<<<static_cast<uint32_t>(blocks), cta.threads, cta.shared_bytes, stream>>>(args);
  return AddParts(args.scratch, blocks * rows, args.d, args.dw, stream);
}

// Calls fn<RowShape>() of rows that a warp takes.
template <int N, typename Fn>
cudaError_t VisitShortRows(int64_t vectors, Fn&& fn) {
  if (vectors <= 32) return fn.template operator()<RowShape<N, 1, kBlockThreads>>();
  if (vectors <= 64) return fn.template operator()<RowShape<N, 2, kBlockThreads>>();
  if (vectors <= 96) return fn.template operator()<RowShape<N, 3, kBlockThreads>>();
  return fn.template operator()<RowShape<N, 4, kBlockThreads>>();
}
constexpr int64_t kShortRow = 128;  // vectors

}  // namespace

template <typename T>
cudaError_t CudaRmsNormForward(const CudaRmsNormForwardArgs<T>& args, cudaStream_t stream) {
  if (args.tokens == 0 || args.d == 0) return cudaSuccess;
  constexpr int kN = kVectorElements<T>;
  const auto launch = [&]<typename S>() { return LaunchForward<S>(args, stream); };
  const bool fit = args.d % kN == 0 && Aligned(args.x) && Aligned(args.w) && Aligned(args.y) &&
                   Aligned(args.residual) && Aligned(args.sum);
  if (!fit) return LaunchForward<RowShape<1, 8, kMaxRowThreads>>(args, stream);
  const int64_t vectors = args.d / kN;
  if (vectors <= kShortRow) return VisitShortRows<kN>(vectors, launch);
  if (vectors <= 4 * 256) return LaunchForward<RowShape<kN, 4, 256>>(args, stream);
  if (vectors <= 4 * kMaxRowThreads) return LaunchForward<RowShape<kN, 4, kMaxRowThreads>>(args, stream);
  return LaunchForward<RowShape<kN, 8, kMaxRowThreads>>(args, stream);
}

template <typename T>
cudaError_t CudaRmsNormBackward(const CudaRmsNormBackwardArgs<T>& args, cudaStream_t stream) {
  if (args.tokens == 0 || args.d == 0) return cudaSuccess;
  constexpr int kN = kVectorElements<T>;
  const auto launch = [&]<typename S>() { return LaunchBackward<S>(args, stream); };
  const bool fit = args.d % kN == 0 && Aligned(args.x) && Aligned(args.w) && Aligned(args.dy) &&
                   Aligned(args.dx) && Aligned(args.scratch);
  if (!fit) return LaunchBackward<RowShape<1, 4, kMaxRowThreads>>(args, stream);
  const int64_t vectors = args.d / kN;
  if (vectors <= kShortRow) return VisitShortRows<kN>(vectors, launch);
  if (vectors <= 2 * kPairThreads) return LaunchBackward<RowShape<kN, 2, kPairThreads>>(args, stream);
  return LaunchBackward<RowShape<kN, 4, kMaxRowThreads>>(args, stream);
}

int64_t CudaRmsNormScratch(int64_t d) { return SmCount() * BackwardRowsOfSm(d) * d; }

template cudaError_t CudaRmsNormForward<float>(const CudaRmsNormForwardArgs<float>&, cudaStream_t);
template cudaError_t CudaRmsNormForward<__nv_bfloat16>(const CudaRmsNormForwardArgs<__nv_bfloat16>&,
                                                       cudaStream_t);
template cudaError_t CudaRmsNormBackward<float>(const CudaRmsNormBackwardArgs<float>&, cudaStream_t);
template cudaError_t CudaRmsNormBackward<__nv_bfloat16>(const CudaRmsNormBackwardArgs<__nv_bfloat16>&,
                                                        cudaStream_t);

}  // namespace annulus::kernels
