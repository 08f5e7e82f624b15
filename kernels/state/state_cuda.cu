// Small states, once a layer and rank: not tuned.

#include "kernels/common/rows.cuh"
#include "kernels/state/state_cuda.h"

namespace annulus::kernels {
namespace {

struct ScaleOp {
  int64_t n;
  const float* factors;
  const float* in;
  const float* state;
  float* out;
  template <int N>
  struct State {
    Pack<float, N> in, state;
  };
  template <int N>
  __device__ State<N> Load(int64_t row, int64_t column) const {
    State<N> loaded = {};
    if (in != nullptr) loaded.in = LoadPack<N>(in + row * n + column);
    loaded.state = LoadPack<N>(state + row * n + column);
    return loaded;
  }
  template <int N>
  __device__ void Store(int64_t row, int64_t column, const State<N>& loaded) const {
    const float factor = in != nullptr ? factors[row] : 0;
    float value[N];
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = factor * loaded.in[i] + loaded.state[i];
    StorePack<N>(PackOf<float>(value), out + row * n + column);
  }
};

constexpr int kColumns = 32, kRowsAtOnce = 8;

// A CTA owns 32 columns of one state: it has read all of them before it writes the first.
//   shared memory: [k, kColumns]
__global__ void __launch_bounds__(kColumns* kRowsAtOnce) AdvanceKernel(const CudaAdvanceStatesArgs args) {
  extern __shared__ float columns[];
  const int64_t index = blockIdx.x, column = int64_t{blockIdx.y} * kColumns + threadIdx.x;
  const bool inside = column < args.v;
  const float* matrix = args.matrix + index * args.k * args.k;
  const int64_t offset = index * args.k * args.v + column;
  for (int64_t i = threadIdx.y; i < args.k; i += kRowsAtOnce) {
    columns[i * kColumns + threadIdx.x] = inside ? args.in[offset + i * args.v] : 0;
  }
  __syncthreads();
  const int64_t row_step = args.form == MatrixForm::kPlain ? args.k : 1, depth_step = args.k + 1 - row_step;
  for (int64_t i = threadIdx.y; i < args.k; i += kRowsAtOnce) {
    float sum = 0;
    for (int64_t j = 0; j < args.k; ++j) {
      sum += matrix[i * row_step + j * depth_step] * columns[j * kColumns + threadIdx.x];
    }
    if (!inside) continue;
    if (args.state != nullptr) sum += args.state[offset + i * args.v];
    args.out[offset + i * args.v] = sum;
  }
}

}  // namespace

cudaError_t CudaScaleStates(int64_t count, int64_t n, const float* factors, const float* in,
                            const float* state, float* out, cudaStream_t stream) {
  const bool fit = n % 4 == 0 && Aligned(in) && Aligned(state) && Aligned(out);
  return LaunchRows<4, 2>(count, n, fit, ScaleOp{n, factors, in, state, out}, stream);
}

cudaError_t CudaAdvanceStates(const CudaAdvanceStatesArgs& args, cudaStream_t stream) {
  if (args.k > kMaxStateRows || args.count > INT32_MAX) return cudaErrorInvalidValue;
  if (args.count == 0 || args.k == 0 || args.v == 0) return cudaSuccess;
  const auto shared = static_cast<int>(args.k * kColumns * int64_t{sizeof(float)});
  const cudaError_t error =
      cudaFuncSetAttribute(AdvanceKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<uint32_t>(args.count), static_cast<uint32_t>(CeilDiv(args.v, kColumns)));
  AdvanceKernel<<<grid, dim3(kColumns, kRowsAtOnce), static_cast<size_t>(shared), stream>>>(args);
  return cudaGetLastError();
}

}  // namespace annulus::kernels
