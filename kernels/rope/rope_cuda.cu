// Rotary embedding. A CTA takes a few rows: it forms their sines and cosines once, in shared memory, while
// its first loads are in flight, and turns all heads of all batch items by them. Angles are reduced in f64,
// in turns: at position 10^6 an f32 angle is off by 0.06 radians. Floor: x read and written once.

#include <cmath>

#include "kernels/common/vector.cuh"
#include "kernels/rope/rope_cuda.h"

namespace annulus::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxHalf = kCudaRopeMaxDim / 2;
constexpr int kMaxAngles = 512;  // of a CTA: rows * dim / 2
constexpr int kUnroll = 2;       // pairs of vectors in flight per thread: 64 KB in an SM of 8 CTAs

// Turns per position of each pair. Powers cost a CTA more than its memory traffic, so the host takes them.
struct Frequencies {
  double turns[kMaxHalf];
};

// Where pair vector `item` of a CTA lies, relative to the CTA's first row.
struct Place {
  uint32_t low;    // element offset of the first half's vector
  uint32_t angle;  // index of its first angle in the CTA's table
};

template <typename T, int N>
__device__ Place Locate(const CudaRopeArgs<T>& args, uint32_t item) {
  const uint32_t half = static_cast<uint32_t>(args.dim) / 2, vectors = half / N;
  const uint32_t heads = static_cast<uint32_t>(args.heads), batch = static_cast<uint32_t>(args.batch);
  const uint32_t vector = item % vectors, head_item = item / vectors;
  const uint32_t head = head_item % heads, row_item = head_item / heads;
  const uint32_t batch_item = row_item % batch, row = row_item / batch;
  return {.low = row * static_cast<uint32_t>(args.row_stride) +
                 batch_item * static_cast<uint32_t>(args.batch_stride) +
                 head * static_cast<uint32_t>(args.dim) + vector * N,
          .angle = row * half + vector * N};
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 8) RopeKernel(const CudaRopeArgs<T> args, int rows_per_block,
                                                          const __grid_constant__ Frequencies frequencies) {
  __shared__ __align__(16) float cosine[kMaxAngles], sine[kMaxAngles];
  const int half = static_cast<int>(args.dim / 2);
  const int64_t first_row = int64_t{blockIdx.x} * rows_per_block;
  const int rows = static_cast<int>(min(int64_t{rows_per_block}, args.rows - first_row));
  T* x = args.x + first_row * args.row_stride;
  const auto items = static_cast<uint32_t>(rows * args.batch * args.heads * (half / N));
  for (uint32_t base = 0; base < items; base += kThreads * kUnroll) {
    Place place[kUnroll];
    Pack<T, N> low[kUnroll], high[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t item = base + u * kThreads + threadIdx.x;
      if (item >= items) continue;
      place[u] = Locate<T, N>(args, item);
      low[u] = LoadPack<N>(static_cast<const T*>(x + place[u].low));
      high[u] = LoadPack<N>(static_cast<const T*>(x + place[u].low + half));
    }
    if (base == 0) {
      for (int a = threadIdx.x; a < rows * half; a += kThreads) {
        double turns =
            static_cast<double>(args.positions[first_row + a / half]) * frequencies.turns[a % half];
        turns -= rint(turns);
        float s, c;
        sincospif(2.0f * static_cast<float>(turns), &s, &c);
        cosine[a] = c;
        sine[a] = args.inverse ? -s : s;
      }
      __syncthreads();
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u * kThreads + threadIdx.x >= items) continue;
      const Pack<float, N> c = LoadPack<N>(static_cast<const float*>(cosine + place[u].angle));
      const Pack<float, N> s = LoadPack<N>(static_cast<const float*>(sine + place[u].angle));
      float a[N], b[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        a[i] = low[u][i] * c[i] - high[u][i] * s[i];
        b[i] = low[u][i] * s[i] + high[u][i] * c[i];
      }
      StorePack<N>(PackOf<T>(a), x + place[u].low);
      StorePack<N>(PackOf<T>(b), x + place[u].low + half);
    }
  }
}

// Rows with two angles for every thread, and where a row has few heads more, until no thread lacks a load.
int64_t RowsPerBlock(int64_t vectors_per_row, int64_t half) {
  const int64_t wanted = std::max(kMaxHalf / half, CeilDiv(kThreads * kUnroll, vectors_per_row));
  return std::max<int64_t>(1, std::min(kMaxAngles / half, wanted));
}

template <typename T, int N>
cudaError_t Launch(const CudaRopeArgs<T>& args, cudaStream_t stream) {
  const int64_t half = args.dim / 2;
  const int64_t rows_per_block = RowsPerBlock(args.batch * args.heads * half / N, half);
  const int64_t blocks = CeilDiv(args.rows, rows_per_block);
  const int64_t reach =
      rows_per_block * args.row_stride + args.batch * args.batch_stride + args.heads * args.dim;
  if (blocks > INT32_MAX || reach > INT32_MAX) return cudaErrorInvalidValue;
  constexpr double kTurnsPerRadian = 0.15915494309189533577;
  Frequencies frequencies = {};
  for (int64_t i = 0; i < half; ++i) {
    const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(args.dim);
    frequencies.turns[i] = std::pow(args.theta, exponent) * kTurnsPerRadian;
  }
  RopeKernel<T, N><<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(
      args, static_cast<int>(rows_per_block), frequencies);
  return cudaGetLastError();
}

}  // namespace

template <typename T>
cudaError_t CudaRope(const CudaRopeArgs<T>& args, cudaStream_t stream) {
  if (args.dim % 2 != 0 || args.dim > kCudaRopeMaxDim) return cudaErrorInvalidValue;
  if (args.rows * args.batch * args.heads * args.dim == 0) return cudaSuccess;
  constexpr int kN = kVectorElements<T>;
  const bool fit = (args.dim / 2) % kN == 0 && args.row_stride % kN == 0 &&
                   (args.batch == 1 || args.batch_stride % kN == 0) && Aligned(args.x);
  return fit ? Launch<T, kN>(args, stream) : Launch<T, 1>(args, stream);
}

template cudaError_t CudaRope<float>(const CudaRopeArgs<float>&, cudaStream_t);
template cudaError_t CudaRope<__nv_bfloat16>(const CudaRopeArgs<__nv_bfloat16>&, cudaStream_t);

}  // namespace annulus::kernels
