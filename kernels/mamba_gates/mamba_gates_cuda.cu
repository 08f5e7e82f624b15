// Floors, bytes per token and head (bf16): forward 2 + 8, backward 2 + 8 + 2.

#include "kernels/common/parts.cuh"
#include "kernels/mamba_gates/mamba_gates_cuda.h"

namespace annulus::kernels {
namespace {

constexpr int kHeads = 32, kTokensAtOnce = 8;  // of a CTA
constexpr int64_t kPartTokens = 256;           // whose sums a CTA leaves

int64_t Parts(int64_t tokens) { return CeilDiv(tokens, kPartTokens); }

// log(1 + e^u), without overflow and exact for very negative u.
__device__ float Softplus(float u) { return fmaxf(u, 0.0f) + log1pf(expf(-fabsf(u))); }

template <typename T>
__global__ void __launch_bounds__(kHeads* kTokensAtOnce)
    ForwardKernel(const CudaMambaGatesArgs<T> args, float* __restrict__ dt, float* __restrict__ a) {
  const int64_t head = int64_t{blockIdx.y} * kHeads + threadIdx.x;
  if (head >= args.heads) return;
  const float bias = args.bias[head], rate = -expf(args.a_log[head]);
  const int64_t begin = blockIdx.x * kPartTokens, end = min(begin + kPartTokens, args.tokens);
  for (int64_t token = begin + threadIdx.y; token < end; token += kTokensAtOnce) {
    const float soft = Softplus(ToFloat(args.raw[token * args.stride + head]) + bias);
    const float step = fminf(fmaxf(soft, args.low), args.high);
    dt[token * args.heads + head] = step;
    a[token * args.heads + head] = rate * step;
  }
}

// scratch: [2, parts, heads]
template <typename T>
__global__ void __launch_bounds__(kHeads* kTokensAtOnce)
    BackwardKernel(const CudaMambaGatesArgs<T> args, const CudaMambaGatesGradients<T> gradients) {
  __shared__ float sums[2][kTokensAtOnce][kHeads];
  const int64_t head = int64_t{blockIdx.y} * kHeads + threadIdx.x;
  float dbias = 0, da_log = 0;
  if (head < args.heads) {
    const float bias = args.bias[head], rate = -expf(args.a_log[head]);
    const int64_t begin = blockIdx.x * kPartTokens, end = min(begin + kPartTokens, args.tokens);
    for (int64_t token = begin + threadIdx.y; token < end; token += kTokensAtOnce) {
      const int64_t gate = token * args.heads + head;
      const float u = ToFloat(args.raw[token * args.stride + head]) + bias, soft = Softplus(u);
      const float da = gradients.da[gate], ddt = gradients.ddt != nullptr ? gradients.ddt[gate] : 0;
      const bool inside = args.low <= soft && soft <= args.high;
      const float draw = inside ? (ddt + da * rate) / (1.0f + expf(-u)) : 0;
      gradients.draw[token * gradients.draw_stride + head] = FromFloat<T>(draw);
      dbias += draw;
      da_log += da * rate * fminf(fmaxf(soft, args.low), args.high);
    }
  }
  sums[0][threadIdx.y][threadIdx.x] = dbias;
  sums[1][threadIdx.y][threadIdx.x] = da_log;
  __syncthreads();
  if (threadIdx.y >= 2 || head >= args.heads) return;
  float sum = 0;
  for (int i = 0; i < kTokensAtOnce; ++i) sum += sums[threadIdx.y][i][threadIdx.x];
  gradients.scratch[(threadIdx.y * int64_t{gridDim.x} + blockIdx.x) * args.heads + head] = sum;
}

dim3 Grid(int64_t tokens, int64_t heads) {
  return {static_cast<uint32_t>(Parts(tokens)), static_cast<uint32_t>(CeilDiv(heads, kHeads))};
}

}  // namespace

template <typename T>
cudaError_t CudaMambaGatesForward(const CudaMambaGatesArgs<T>& args, float* dt, float* a,
                                  cudaStream_t stream) {
  if (args.tokens == 0 || args.heads == 0) return cudaSuccess;
  ForwardKernel<<<Grid(args.tokens, args.heads), dim3(kHeads, kTokensAtOnce), 0, stream>>>(args, dt, a);
  return cudaGetLastError();
}

template <typename T>
cudaError_t CudaMambaGatesBackward(const CudaMambaGatesArgs<T>& args,
                                   const CudaMambaGatesGradients<T>& gradients, cudaStream_t stream) {
  if (args.tokens == 0 || args.heads == 0) return cudaSuccess;
  BackwardKernel<<<Grid(args.tokens, args.heads), dim3(kHeads, kTokensAtOnce), 0, stream>>>(args, gradients);
  const int64_t parts = Parts(args.tokens);
  cudaError_t error = AddParts(gradients.scratch, parts, args.heads, gradients.dbias, stream);
  if (error == cudaSuccess) {
    error = AddParts(gradients.scratch + parts * args.heads, parts, args.heads, gradients.da_log, stream);
  }
  return error;
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
