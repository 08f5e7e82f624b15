// A thread takes N heads of some tokens, several of which are on their way at once.
// Floors, bytes per token and head (bf16): forward 2 + 8, backward 2 + 8 + 2. On H200 they run at 70% and 57%
// of the speed of a copy at 131,072 tokens of 80 heads, 35 and 51 us: the rest are the exponentials and
// logarithms of f32, the beginnings and ends of short kernels, and the second one that adds the backward's
// partial sums.

#include "kernels/common/parts.cuh"
#include "kernels/mamba_gates/mamba_gates_cuda.h"

namespace annulus::kernels {
namespace {

constexpr int kThreads = 256, kMostLanes = 32;        // of a CTA, and of one token in it
constexpr int kForwardAhead = 4, kBackwardAhead = 2;  // tokens of a thread at once
constexpr int kHeads = 4;                             // of a thread, where rows allow it
constexpr int64_t kPartTokens = 128;                  // of a CTA

int64_t Parts(int64_t tokens) { return CeilDiv(tokens, kPartTokens); }

// log(1 + e^u), without overflow and exact for very negative u, and its derivative.
struct Softplus {
  float value, slope;
  __device__ explicit Softplus(float u) {
    const float small = expf(-fabsf(u));
    value = fmaxf(u, 0.0f) + log1pf(small);
    slope = __fdividef(u < 0 ? small : 1.0f, 1.0f + small);
  }
};

// What a thread works on: N heads of every blockDim.y-th token of a part.
template <typename T, int N>
struct Lane {
  int64_t head, begin, end;
  float bias[N], rate[N];

  __device__ explicit Lane(const CudaMambaGatesArgs<T>& args)
      : head((int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * N),
        begin(blockIdx.x * kPartTokens + threadIdx.y),
        end(min((blockIdx.x + int64_t{1}) * kPartTokens, args.tokens)) {
    if (head >= args.heads) end = 0;
    if (begin >= end) return;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      bias[n] = args.bias[head + n];
      rate[n] = -expf(args.a_log[head + n]);
    }
  }
  // Calls load(i, token) for some tokens, then use(i, token) for the same.
  template <int kAhead, typename Load, typename Use>
  __device__ void Walk(const Load& load, const Use& use) const {
    for (int64_t first = begin; first < end; first += kAhead * blockDim.y) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i * blockDim.y < end) load(i, first + i * blockDim.y);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i * blockDim.y < end) use(i, first + i * blockDim.y);
      }
    }
  }
};

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    ForwardKernel(const CudaMambaGatesArgs<T> args, float* __restrict__ dt, float* __restrict__ a) {
  const Lane<T, N> lane(args);
  Pack<T, N> raw[kForwardAhead];
  lane.template Walk<kForwardAhead>(
      [&](int i, int64_t token) { raw[i] = LoadPack<N>(args.raw + token * args.stride + lane.head); },
      [&](int i, int64_t token) {
        float step[N], decay[N];
#pragma unroll
        for (int n = 0; n < N; ++n) {
          step[n] = fminf(fmaxf(Softplus(raw[i][n] + lane.bias[n]).value, args.low), args.high);
          decay[n] = lane.rate[n] * step[n];
        }
        StorePack<N>(PackOf<float>(step), dt + token * args.heads + lane.head);
        StorePack<N>(PackOf<float>(decay), a + token * args.heads + lane.head);
      });
}

// scratch: [2, parts, heads]
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 4)
    BackwardKernel(const CudaMambaGatesArgs<T> args, const CudaMambaGatesGradients<T> gradients) {
  __shared__ float sums[2][kThreads * N];
  const Lane<T, N> lane(args);
  Pack<T, N> raw[kBackwardAhead];
  Pack<float, N> das[kBackwardAhead], ddts[kBackwardAhead] = {};
  float dbias[N] = {}, da_log[N] = {};
  lane.template Walk<kBackwardAhead>(
      [&](int i, int64_t token) {
        const int64_t gate = token * args.heads + lane.head;
        raw[i] = LoadPack<N>(args.raw + token * args.stride + lane.head);
        das[i] = LoadPack<N>(gradients.da + gate);
        if (gradients.ddt != nullptr) ddts[i] = LoadPack<N>(gradients.ddt + gate);
      },
      [&](int i, int64_t token) {
        float draw[N];
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const Softplus soft(raw[i][n] + lane.bias[n]);
          const float da = das[i][n] * lane.rate[n];
          const bool inside = args.low <= soft.value && soft.value <= args.high;
          draw[n] = inside ? (ddts[i][n] + da) * soft.slope : 0;
          dbias[n] += draw[n];
          da_log[n] += da * fminf(fmaxf(soft.value, args.low), args.high);
        }
        StorePack<N>(PackOf<T>(draw), gradients.draw + token * gradients.draw_stride + lane.head);
      });
  const int width = static_cast<int>(blockDim.x) * N, place = static_cast<int>(threadIdx.y) * width;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    sums[0][place + threadIdx.x * N + n] = dbias[n];
    sums[1][place + threadIdx.x * N + n] = da_log[n];
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); i < 2 * width;
       i += static_cast<int>(blockDim.x * blockDim.y)) {
    const int64_t kind = i / width, head = int64_t{blockIdx.y} * width + i % width;
    if (head >= args.heads) continue;
    float sum = 0;
    for (int y = 0; y < static_cast<int>(blockDim.y); ++y) sum += sums[kind][y * width + i % width];
    gradients.scratch[(kind * gridDim.x + blockIdx.x) * args.heads + head] = sum;
  }
}

// Calls fn<N>(grid, block), N heads to a thread.
template <typename Fn>
cudaError_t VisitHeads(int64_t tokens, int64_t heads, bool vectors_fit, Fn&& fn) {
  const int64_t lanes = vectors_fit ? heads / kHeads : heads;
  const auto x = static_cast<uint32_t>(std::min<int64_t>(lanes, kMostLanes));
  const dim3 grid(static_cast<uint32_t>(Parts(tokens)), static_cast<uint32_t>(CeilDiv(lanes, x)));
  const dim3 block(x, kThreads / x);
  if (vectors_fit) {
    fn.template operator()<kHeads>(grid, block);
  } else {
    fn.template operator()<1>(grid, block);
  }
  return cudaGetLastError();
}

// Rows of T of which every fourth element can begin a vector.
template <typename T>
bool Fits(const T* rows, int64_t stride) {
  return reinterpret_cast<uintptr_t>(rows) % (kHeads * sizeof(T)) == 0 && stride % kHeads == 0;
}

}  // namespace

template <typename T>
cudaError_t CudaMambaGatesForward(const CudaMambaGatesArgs<T>& args, float* dt, float* a,
                                  cudaStream_t stream) {
  if (args.tokens == 0 || args.heads == 0) return cudaSuccess;
  const bool fit = Fits(args.raw, args.stride) && Fits(dt, args.heads) && Fits(a, args.heads);
  return VisitHeads(args.tokens, args.heads, fit, [&]<int N>(const dim3& grid, const dim3& block) {
    ForwardKernel<T, N><<<grid, block, 0, stream>>>(args, dt, a);
  });
}

template <typename T>
cudaError_t CudaMambaGatesBackward(const CudaMambaGatesArgs<T>& args,
                                   const CudaMambaGatesGradients<T>& gradients, cudaStream_t stream) {
  if (args.tokens == 0 || args.heads == 0) return cudaSuccess;
  const bool fit = Fits(args.raw, args.stride) && Fits(gradients.da, args.heads) &&
                   Fits(gradients.ddt, args.heads) && Fits(gradients.draw, gradients.draw_stride);
  const cudaError_t error =
      VisitHeads(args.tokens, args.heads, fit, [&]<int N>(const dim3& grid, const dim3& block) {
        BackwardKernel<T, N><<<grid, block, 0, stream>>>(args, gradients);
      });
  if (error != cudaSuccess) return error;
  const int64_t parts = Parts(args.tokens);
  return AddParts(parts, {gradients.scratch, args.heads, gradients.dbias},
                  {gradients.scratch + parts * args.heads, args.heads, gradients.da_log}, stream);
}

int64_t CudaMambaGatesScratch(int64_t tokens, int64_t heads) { return 2 * Parts(tokens) * heads; }

#define ANNULUS_INSTANTIATE(T)                                                                            \
  template cudaError_t CudaMambaGatesForward(const CudaMambaGatesArgs<T>&, float*, float*, cudaStream_t); \
  template cudaError_t CudaMambaGatesBackward(const CudaMambaGatesArgs<T>&,                               \
                                              const CudaMambaGatesGradients<T>&, cudaStream_t)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(__nv_bfloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
