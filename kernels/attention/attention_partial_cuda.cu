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
  uint32_t batch;
  float value;

  template <int N>
  __device__ State<N> Load(int64_t, int64_t) const {
    return {};
  }
  template <int N>
  __device__ void Store(int64_t row, int64_t column, const State<N>&) const {
    Pack<float, N> values;
    for (float& x : values.value) x = value;
    const auto token = static_cast<uint32_t>(row);
    StorePack(values, to.data + token / batch * to.row_stride + token % batch * to.batch_stride + column);
  }
};

// Whether every head of dim elements starts on 16 bytes.
template <typename T>
bool HeadsAligned(const CudaHeads<T>& x, int64_t dim) {
  constexpr int kN = kVectorElements<T>;
  return Aligned(x.data) && dim % kN == 0 && x.row_stride % kN == 0 && x.batch_stride % kN == 0;
}

// 2^lane_bits threads share a head, N elements a time. With more than one head a thread, fewer threads are
// there to hide the reductions: two take 2% longer, four 15%.
template <int N, typename T>
__global__ void __launch_bounds__(kThreads)
    DeltaKernel(const __grid_constant__ CudaAttentionDeltaArgs<T> args, uint32_t stats, int lane_bits) {
  const uint32_t lanes = 1u << lane_bits, lane = threadIdx.x % lanes;
  const uint32_t stat = blockIdx.x * (kThreads >> lane_bits) + (threadIdx.x >> lane_bits);
  const auto heads = static_cast<uint32_t>(args.heads), batch = static_cast<uint32_t>(args.batch);
  const uint32_t head = stat % heads, token = stat / heads, row = token / batch, item = token % batch;
  const T* out = args.out.data + row * args.out.row_stride + item * args.out.batch_stride + head * args.v_dim;
  const T* dout =
      args.dout.data + row * args.dout.row_stride + item * args.dout.batch_stride + head * args.v_dim;
  float sum = 0;
  for (int64_t c = lane * N; stat < stats && c < args.v_dim; c += lanes * N) {
    const Pack<T, N> x = LoadPack<N>(out + c), y = LoadPack<N>(dout + c);
#pragma unroll
    for (int i = 0; i < N; ++i) sum = fmaf(x[i], y[i], sum);
  }
  for (uint32_t offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (stat < stats && lane == 0) args.delta[stat] = sum;
}

template <int N, typename T>
cudaError_t LaunchDelta(const CudaAttentionDeltaArgs<T>& args, cudaStream_t stream) {
  int lane_bits = 0;
  while (lane_bits < 5 && (N << lane_bits) < args.v_dim) ++lane_bits;
  const int64_t stats = args.rows * args.batch * args.heads;
  if (stats > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t blocks = CeilDiv(stats, kThreads >> lane_bits);
  if (blocks == 0) return cudaSuccess;
  DeltaKernel<N>
      <<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(args, static_cast<uint32_t>(stats), lane_bits);
  return cudaGetLastError();
}

}  // namespace

cudaError_t CudaResetPartial(const CudaResetPartialArgs& args, cudaStream_t stream) {
  const int64_t tokens = args.rows * args.batch;
  if (tokens > UINT32_MAX) return cudaErrorInvalidValue;
  const SetOp zero{args.out, static_cast<uint32_t>(args.batch), 0};
  const cudaError_t error =
      LaunchRows<4, 4>(tokens, args.heads * args.v_dim, HeadsAligned(args.out, 4), zero, stream);
  if (error != cudaSuccess) return error;
  const SetOp no_keys{{args.lse, 0, 0}, 1, -INFINITY};
  return LaunchRows<4, 4>(1, tokens * args.heads, Aligned(args.lse), no_keys, stream);
}

template <typename T>
cudaError_t CudaAttentionDelta(const CudaAttentionDeltaArgs<T>& args, cudaStream_t stream) {
  const bool aligned = HeadsAligned(args.out, args.v_dim) && HeadsAligned(args.dout, args.v_dim);
  return aligned ? LaunchDelta<kVectorElements<T>>(args, stream) : LaunchDelta<1>(args, stream);
}
template cudaError_t CudaAttentionDelta(const CudaAttentionDeltaArgs<float>&, cudaStream_t);
template cudaError_t CudaAttentionDelta(const CudaAttentionDeltaArgs<__nv_bfloat16>&, cudaStream_t);

}  // namespace annulus::kernels
