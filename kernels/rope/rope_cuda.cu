// Rotary embedding. A CTA takes a few rows: it forms their sines and cosines once, in shared memory, while
// its first loads are in flight, and turns all heads of all batch items by them. Angles are reduced in f64,
// in turns: at position 10^6 an f32 angle is off by 0.06 radians. Floor: x read and written once. Heads that
// are few share the cost of their angles among few elements.

#include <bit>
#include <cmath>

#include "kernels/common/vector.cuh"
#include "kernels/rope/rope_cuda.h"

namespace annulus::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxHalf = kCudaRopeMaxDim / 2;
constexpr int kMaxAngles = 512;  // of a CTA: rows * dim / 2
constexpr int kThreadAngles = kMaxAngles / kThreads;
constexpr int kUnroll = 2;  // pairs of vectors in flight per thread: 64 KB in an SM of 4 CTAs

// Turns per position of each pair. Powers cost a CTA more than its memory traffic, so the host takes them.
struct Frequencies {
  double turns[kMaxHalf];
};

// Division by a number that the host knows, of anything below 2^31, in three instructions: n / d is
// (n + n * multiplier / 2^32) / 2^shift. Plain divisions were most of the kernel's instructions.
class Divisor {
 public:
  Divisor() = default;
  // In [1, 2^31).
  explicit Divisor(int64_t d)
      : divisor_(static_cast<uint32_t>(d)), shift_(std::bit_width(static_cast<uint64_t>(d - 1))) {
    multiplier_ =
        static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift_) - divisor_)) / divisor_ + 1);
  }
  __device__ uint32_t Quotient(uint32_t n) const { return (__umulhi(n, multiplier_) + n) >> shift_; }
  // n becomes the quotient.
  __device__ uint32_t Remainder(uint32_t& n) const {
    const uint32_t quotient = Quotient(n), remainder = n - quotient * divisor_;
    n = quotient;
    return remainder;
  }

 private:
  uint32_t divisor_ = 1, multiplier_ = 1;
  int shift_ = 0;
};

struct Tile {
  int rows;                             // of a CTA
  Divisor half, vectors, heads, batch;  // half: of a head; vectors: of half a head
};

// Where pair vector `item` of a CTA lies, relative to the CTA's first row.
struct Place {
  uint32_t low;    // element offset of the first half's vector
  uint32_t angle;  // index of its first angle in the CTA's table
};

// A warp reads many frequencies at once. As constants they would come one after the other, so they are read
// through their address in global memory.
__device__ const double* InGlobalMemory(const Frequencies& frequencies) {
  const double* turns;
  asm("mov.b64 %0, %1;" : "=l"(turns) : "l"(frequencies.turns));
  return turns;
}

template <int N, typename T>
__device__ Place Locate(const CudaRopeArgs<T>& args, const Tile& tile, uint32_t item) {
  const uint32_t vector = tile.vectors.Remainder(item), head = tile.heads.Remainder(item),
                 batch_item = tile.batch.Remainder(item), row = item;
  const auto dim = static_cast<uint32_t>(args.dim);
  return {.low = row * static_cast<uint32_t>(args.row_stride) +
                 batch_item * static_cast<uint32_t>(args.batch_stride) + head * dim + vector * N,
          .angle = row * (dim / 2) + vector * N};
}

// The sines and cosines of the CTA's rows, [rows, half], in two steps: positions are asked for before the
// first loads of x, so that they are here first.
struct Angles {
  int64_t position[kThreadAngles];
  double frequency[kThreadAngles];

  template <typename T>
  __device__ void Load(const CudaRopeArgs<T>& args, const Tile& tile, const Frequencies& frequencies,
                       int64_t first_row, uint32_t count) {
    const double* const turns_of_pair = InGlobalMemory(frequencies);
#pragma unroll
    for (int i = 0; i < kThreadAngles; ++i) {
      uint32_t row = i * kThreads + threadIdx.x;
      position[i] = 0;
      frequency[i] = 0;
      if (row >= count) continue;
      const uint32_t pair = tile.half.Remainder(row);
      position[i] = args.positions[first_row + row];
      frequency[i] = turns_of_pair[pair];
    }
  }
  __device__ void Form(bool inverse, uint32_t count, float* cosine, float* sine) {
    // The compiler would wait for the positions before it asks for x.
#pragma unroll
    for (int64_t& p : position) asm volatile("" : "+l"(p)::"memory");
#pragma unroll
    for (int i = 0; i < kThreadAngles; ++i) {
      const uint32_t angle = i * kThreads + threadIdx.x;
      if (angle >= count) break;
      const double turns = static_cast<double>(position[i]) * frequency[i];
      float s, c;
      sincospif(2.0f * static_cast<float>(turns - rint(turns)), &s, &c);
      cosine[angle] = c;
      sine[angle] = inverse ? -s : s;
    }
  }
};

template <typename T, int N>
__device__ void Turn(const float* cosine, const float* sine, Pack<T, N>& low, Pack<T, N>& high) {
  constexpr int kPart = N < 4 ? N : 4;
#pragma unroll
  for (int part = 0; part < N; part += kPart) {
    const Pack<float, kPart> c = LoadPack<kPart>(cosine + part), s = LoadPack<kPart>(sine + part);
    float a[kPart], b[kPart];
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      a[i] = low[part + i] * c[i] - high[part + i] * s[i];
      b[i] = low[part + i] * s[i] + high[part + i] * c[i];
    }
    const Pack<T, kPart> new_low = PackOf<T>(a), new_high = PackOf<T>(b);
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      low.value[part + i] = new_low.value[i];
      high.value[part + i] = new_high.value[i];
    }
  }
}

// Pairs of vectors that a thread has in flight together.
template <typename T, int N>
struct Batch {
  Place place[kUnroll];
  Pack<T, N> low[kUnroll], high[kUnroll];
  int count = 0;

  __device__ void Load(const CudaRopeArgs<T>& args, const Tile& tile, const T* x, uint32_t item,
                       uint32_t items) {
    count = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (item + u * kThreads >= items) break;
      place[u] = Locate<N>(args, tile, item + u * kThreads);
      low[u] = LoadPack<N>(x + place[u].low);
      high[u] = LoadPack<N>(x + place[u].low + args.dim / 2);
      count = u + 1;
    }
  }
  __device__ void TurnAndStore(const float* cosine, const float* sine, T* x, uint32_t half) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) break;
      Turn(cosine + place[u].angle, sine + place[u].angle, low[u], high[u]);
      StorePack<N>(low[u], x + place[u].low);
      StorePack<N>(high[u], x + place[u].low + half);
    }
  }
};

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 4)
    RopeKernel(const __grid_constant__ CudaRopeArgs<T> args, const __grid_constant__ Tile tile,
               const __grid_constant__ Frequencies frequencies) {
  __shared__ __align__(16) float cosine[kMaxAngles], sine[kMaxAngles];
  const auto half = static_cast<uint32_t>(args.dim / 2);
  const int64_t first_row = int64_t{blockIdx.x} * tile.rows;
  const auto rows = static_cast<uint32_t>(min(int64_t{tile.rows}, args.rows - first_row));
  T* const x = args.x + first_row * args.row_stride;
  const auto items = rows * static_cast<uint32_t>(args.batch * args.heads) * (half / N);
  Angles angles;
  angles.Load(args, tile, frequencies, first_row, rows * half);
  Batch<T, N> batch;
  batch.Load(args, tile, x, threadIdx.x, items);
  angles.Form(args.inverse, rows * half, cosine, sine);
  __syncthreads();
  batch.TurnAndStore(cosine, sine, x, half);
  for (uint32_t base = kThreads * kUnroll; base < items; base += kThreads * kUnroll) {
    batch.Load(args, tile, x, base + threadIdx.x, items);
    batch.TurnAndStore(cosine, sine, x, half);
  }
}

// Rows with an angle for every thread, and where a row has few heads more, until no thread lacks a load.
int64_t RowsPerBlock(int64_t vectors_per_row, int64_t half) {
  const int64_t wanted = std::max(kMaxHalf / half, CeilDiv(kThreads * kUnroll, vectors_per_row));
  return std::max<int64_t>(1, std::min(kMaxAngles / half, wanted));
}

template <typename T, int N>
cudaError_t Launch(const CudaRopeArgs<T>& args, cudaStream_t stream) {
  const int64_t half = args.dim / 2, vectors = half / N;
  const int64_t rows_per_block = RowsPerBlock(args.batch * args.heads * vectors, half);
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
  const Tile tile{.rows = static_cast<int>(rows_per_block),
                  .half = Divisor(half),
                  .vectors = Divisor(vectors),
                  .heads = Divisor(args.heads),
                  .batch = Divisor(args.batch)};
  RopeKernel<T, N><<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(args, tile, frequencies);
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
