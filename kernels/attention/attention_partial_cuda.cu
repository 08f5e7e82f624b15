#include "kernels/attention/attention_partial_cuda.h"
#include "kernels/common/rows.cuh"

namespace annulus::kernels {
namespace {

constexpr int kThreads = 256;

// Sets elements, a row of RowsKernel being one row of one batch item.
struct SetOp {
  template <int N>
  struct State {};

  CudaHeads<float> to;
  int64_t batch;
  float value;

  template <int N>
  __device__ State<N> Load(int64_t, int64_t) const {
    return {};
  }
  template <int N>
  __device__ void Store(int64_t row, int64_t column, const State<N>&) const {
    Pack<float, N> values;
    for (float& x : values.value) x = value;
    StorePack(values, to.data + row / batch * to.row_stride + row % batch * to.batch_stride + column);
  }
};

// Whether every head of dim elements starts on 16 bytes.
template <typename T>
bool HeadsAligned(const CudaHeads<T>& x, int64_t dim) {
  constexpr int kN = kVectorElements<T>;
  return Aligned(x.data) && dim % kN == 0 && x.row_stride % kN == 0 && x.batch_stride % kN == 0;
}

// `lanes` threads, a power of two, share a head, N elements a time.
template <int N, typename T>
__global__ void __launch_bounds__(kThreads) DeltaKernel(const CudaAttentionDeltaArgs<T> args, int lanes) {
  const int64_t stat = int64_t{blockIdx.x} * (kThreads / lanes) + threadIdx.x / lanes;
  const bool inside = stat < args.rows * args.batch * args.heads;
  const int64_t head = stat % args.heads, token = stat / args.heads;
  const int64_t row = token / args.batch, item = token % args.batch;
  const T* out = args.out.data + row * args.out.row_stride + item * args.out.batch_stride + head * args.v_dim;
  const T* dout =
      args.dout.data + row * args.dout.row_stride + item * args.dout.batch_stride + head * args.v_dim;
  float sum = 0;
  for (int64_t c = threadIdx.x % lanes * N; inside && c < args.v_dim; c += lanes * N) {
    const Pack<T, N> x = LoadPack<N>(out + c), y = LoadPack<N>(dout + c);
#pragma unroll
    for (int i = 0; i < N; ++i) sum = fmaf(x[i], y[i], sum);
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (inside && threadIdx.x % lanes == 0) args.delta[stat] = sum;
}

template <int N, typename T>
cudaError_t LaunchDelta(const CudaAttentionDeltaArgs<T>& args, cudaStream_t stream) {
  int lanes = 1;
  while (lanes < 32 && lanes * N < args.v_dim) lanes *= 2;
  const int64_t blocks = CeilDiv(args.rows * args.batch * args.heads, kThreads / lanes);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (blocks > 0) DeltaKernel<N><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args, lanes);
  return cudaGetLastError();
}

}  // namespace

cudaError_t CudaResetPartial(const CudaResetPartialArgs& args, cudaStream_t stream) {
  const int64_t tokens = args.rows * args.batch;
  const SetOp zero{args.out, args.batch, 0};
  const cudaError_t error =
      LaunchRows<4, 1>(tokens, args.heads * args.v_dim, HeadsAligned(args.out, 4), zero, stream);
  if (error != cudaSuccess) return error;
  const SetOp no_keys{{args.lse, 0, 0}, 1, -INFINITY};
  return LaunchRows<4, 1>(1, tokens * args.heads, Aligned(args.lse), no_keys, stream);
}

template <typename T>
cudaError_t CudaAttentionDelta(const CudaAttentionDeltaArgs<T>& args, cudaStream_t stream) {
  const bool aligned = HeadsAligned(args.out, args.v_dim) && HeadsAligned(args.dout, args.v_dim);
  return aligned ? LaunchDelta<kVectorElements<T>>(args, stream) : LaunchDelta<1>(args, stream);
}
template cudaError_t CudaAttentionDelta(const CudaAttentionDeltaArgs<float>&, cudaStream_t);
template cudaError_t CudaAttentionDelta(const CudaAttentionDeltaArgs<__nv_bfloat16>&, cudaStream_t);

}  // namespace annulus::kernels
