// A thread walks along the rows of a tile with N channels, the last k - 1 rows in its registers: every
// element is read once and, at the edges of tiles, again out of the caches. Floors, elements moved per
// element of x: forward 2, backward 3. Per element the backward computes about 3 k + 12 instructions, which
// at k = 4 is two thirds of the time that its memory takes.

#include "kernels/common/parts.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/conv1d/conv1d_cuda.h"

namespace annulus::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kAhead = 4;  // rows whose loads are in flight together

// bf16 keeps 8 bits: the special-function units' 21 suffice there, and f32 gets the library's.
template <typename T>
__device__ float Sigmoid(float x) {
  if constexpr (sizeof(T) == 2) return __fdividef(1.0f, 1.0f + __expf(-x));
  return 1.0f / (1.0f + expf(-x));
}

// What a thread works on: N channels of one item in one tile. K: at least k.
template <typename T, int N, int K>
struct Lane {
  const CudaConv1dArgs<T>& args;
  ChunkRows tile;
  int64_t item, channel;

  __device__ explicit Lane(const CudaConv1dArgs<T>& a)
      : args(a),
        tile(ChunkAt(a.tiles, blockIdx.x / a.batch)),
        item(blockIdx.x % a.batch),
        channel((int64_t{blockIdx.y} * kThreads + threadIdx.x) * N) {}

  // Row of the halo in which `row`, before the segment, lies; negative: in none.
  __device__ int64_t HaloRow(int64_t row) const { return args.k - 1 + row - tile.segment_begin; }
  __device__ int64_t HaloOffset(int64_t row) const {
    return ((tile.segment * int64_t{args.k - 1} + HaloRow(row)) * args.batch + item) * args.channels +
           channel;
  }
  // Zeros before the halo and past the segment.
  __device__ Pack<T, N> Load(int64_t row) const {
    if (row >= tile.segment_end) return {};
    if (row >= tile.segment_begin) {
      return LoadPack<N>(args.x.data + row * args.x.row_stride + item * args.x.batch_stride + channel);
    }
    if (HaloRow(row) < 0) return {};
    return LoadPack<N>(args.halo + HaloOffset(row));
  }
  // Taps of a row that lie in its document.
  __device__ int Taps(int64_t row) const {
    if (row >= tile.segment_end) return 0;
    return min(args.k, args.ages[row * args.batch + item] + 1);
  }
  __device__ void LoadWeights(float (&w)[K][N], float (&bias)[N]) const {
#pragma unroll
    for (int j = 0; j < K; ++j) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        w[j][n] = j < args.k ? ToFloat(args.w[(channel + n) * args.k + args.k - 1 - j]) : 0;
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) bias[n] = args.bias != nullptr ? ToFloat(args.bias[channel + n]) : 0;
  }
};

// u = bias + sum over taps of w x; x[last] is the row's own.
template <int K, int N, typename T, int kRows>
__device__ void Apply(const float (&w)[K][N], const float (&bias)[N], const Pack<T, N> (&x)[kRows], int last,
                      int taps, float (&u)[N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) u[n] = bias[n];
#pragma unroll
  for (int j = 0; j < K; ++j) {
    if (j >= taps) continue;
#pragma unroll
    for (int n = 0; n < N; ++n) u[n] += w[j][n] * x[last - j][n];
  }
}

template <typename T, int N, int K>
__global__ void __launch_bounds__(kThreads)
    ForwardKernel(const __grid_constant__ CudaConv1dArgs<T> args, const StridedRows<T> out) {
  const Lane<T, N, K> lane(args);
  if (lane.channel >= args.channels) return;
  float w[K][N], bias[N];
  lane.LoadWeights(w, bias);
  Pack<T, N> x[K - 1 + kAhead];
#pragma unroll
  for (int i = 0; i < K - 1; ++i) x[i] = lane.Load(lane.tile.begin - (K - 1) + i);
  for (int64_t begin = lane.tile.begin; begin < lane.tile.end; begin += kAhead) {
    int taps[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      x[K - 1 + i] = lane.Load(begin + i);
      taps[i] = lane.Taps(begin + i);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      float u[N];
      Apply<K, N>(w, bias, x, K - 1 + i, taps[i], u);
#pragma unroll
      for (int n = 0; n < N; ++n) u[n] *= Sigmoid<T>(u[n]);
      if (begin + i >= lane.tile.end) continue;
      StorePack<N>(PackOf<T>(u),
                   out.data + (begin + i) * out.row_stride + lane.item * out.batch_stride + lane.channel);
    }
#pragma unroll
    for (int i = 0; i < K - 1; ++i) x[i] = x[kAhead + i];
  }
}

// With u recomputed:  du = dy silu'(u)     dx[t - j] += w_j du[t]     dw_j += du[t] x[t - j]     dbias +=
// du[t] Row t is done once du[t + K - 1] is: the walk goes K - 1 rows past the tile, whose own sums of dw
// leave those rows out. Rows before a segment are its halo's.
//   scratch: [tiles, batch, channels, k], then [tiles, batch, channels]
template <typename T, int N, int K>
__global__ void __launch_bounds__(kThreads)
    BackwardKernel(const __grid_constant__ CudaConv1dArgs<T> args, const CudaConv1dGradients<T> to) {
  const Lane<T, N, K> lane(args);
  if (lane.channel >= args.channels) return;
  const ChunkRows& tile = lane.tile;
  float w[K][N], bias[N], dw[K][N] = {}, dbias[N] = {};
  lane.LoadWeights(w, bias);
  Pack<T, N> x[K - 1 + kAhead];
  float dx[K][N] = {};  // of rows t - j
#pragma unroll
  for (int i = 0; i < K - 1; ++i) x[i] = lane.Load(tile.begin - (K - 1) + i);
  for (int64_t begin = tile.begin; begin < tile.end + K - 1; begin += kAhead) {
    int taps[kAhead];
    Pack<T, N> dy[kAhead] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t row = begin + i;
      x[K - 1 + i] = lane.Load(row);
      taps[i] = lane.Taps(row);
      if (row < tile.segment_end) {
        dy[i] =
            LoadPack<N>(to.dy.data + row * to.dy.row_stride + lane.item * to.dy.batch_stride + lane.channel);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t row = begin + i, done = row - (K - 1);
      float du[N];
      Apply<K, N>(w, bias, x, K - 1 + i, taps[i], du);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float s = Sigmoid<T>(du[n]);
        du[n] = dy[i][n] * (s + du[n] * s * (1.0f - s));
      }
      const bool own = row < tile.end;
#pragma unroll
      for (int j = 0; j < K; ++j) {
        if (j >= taps[i]) continue;
#pragma unroll
        for (int n = 0; n < N; ++n) {
          dx[j][n] += w[j][n] * du[n];
          if (own) dw[j][n] += du[n] * x[K - 1 + i - j][n];
        }
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (own) dbias[n] += du[n];
      }
      if (tile.begin <= done && done < tile.end) {
        StorePack<N>(PackOf<T>(dx[K - 1]),
                     to.dx.data + done * to.dx.row_stride + lane.item * to.dx.batch_stride + lane.channel);
      } else if (tile.first && done < tile.begin && lane.HaloRow(done) >= 0) {
        StorePack<N>(PackOf<T>(dx[K - 1]), to.dhalo + lane.HaloOffset(done));
      }
#pragma unroll
      for (int j = K - 1; j > 0; --j) {
#pragma unroll
        for (int n = 0; n < N; ++n) dx[j][n] = dx[j - 1][n];
      }
#pragma unroll
      for (int n = 0; n < N; ++n) dx[0][n] = 0;
    }
#pragma unroll
    for (int i = 0; i < K - 1; ++i) x[i] = x[kAhead + i];
  }
  float* dw_part = to.scratch + (blockIdx.x * args.channels + lane.channel) * args.k;
  float* dbias_part = to.scratch + (gridDim.x * args.k + blockIdx.x) * args.channels + lane.channel;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int j = 0; j < K; ++j) {
      if (j < args.k) dw_part[n * args.k + args.k - 1 - j] = dw[j][n];
    }
    dbias_part[n] = dbias[n];
  }
}

// Calls fn<N, K>(): channels of a thread, taps it has registers for.
template <typename T, int kVector, typename Fn>
cudaError_t VisitShape(const CudaConv1dArgs<T>& args, bool vectors_fit, Fn&& fn) {
  if (args.k < 1 || args.k > kMaxConvTaps) return cudaErrorInvalidValue;
  if (!vectors_fit) {
    return args.k <= 4 ? fn.template operator()<1, 4>() : fn.template operator()<1, kMaxConvTaps>();
  }
  if (args.k <= 2) return fn.template operator()<kVector, 2>();
  if (args.k <= 4) return fn.template operator()<kVector, 4>();
  return fn.template operator()<kVector, kMaxConvTaps>();
}

template <int N, typename T>
dim3 Grid(const CudaConv1dArgs<T>& args) {
  return {static_cast<uint32_t>(args.tiles.chunks() * args.batch),
          static_cast<uint32_t>(CeilDiv(args.channels, kThreads * N))};
}

// Rows on whole vectors.
template <int N, typename T>
bool Fits(const StridedRows<T>& x) {
  return reinterpret_cast<uintptr_t>(x.data) % (N * sizeof(T)) == 0 && x.row_stride % N == 0 &&
         x.batch_stride % N == 0;
}

}  // namespace

ConvTileRows CudaConv1dTileRows(int64_t rows, int64_t batch, int64_t channels) {
  constexpr int64_t kThreadsWanted = 132 * 2048;  // of the device; tiles do not depend on which one it is
  const auto fill = [&](int64_t most, int64_t thread_channels) {
    int64_t tile = most;
    while (tile > 16 && rows * batch * channels < kThreadsWanted * tile * thread_channels) tile /= 2;
    return tile;
  };
  return {.forward = fill(64, 8), .backward = fill(512, 4)};
}

template <typename T>
cudaError_t CudaConv1dForward(const CudaConv1dArgs<T>& args, StridedRows<T> y, cudaStream_t stream) {
  constexpr int kN = kVectorElements<T>;
  if (args.rows * args.batch * args.channels == 0) return cudaSuccess;
  const bool fit = args.channels % kN == 0 && Fits<kN>(args.x) && Fits<kN>(y) && Aligned(args.halo);
  return VisitShape<T, kN>(args, fit, [&]<int N, int K>() {
    ForwardKernel<T, N, K><<<Grid<N>(args), kThreads, 0, stream>>>(args, y);
    return cudaGetLastError();
  });
}

template <typename T>
cudaError_t CudaConv1dBackward(const CudaConv1dArgs<T>& args, const CudaConv1dGradients<T>& to,
                               cudaStream_t stream) {
  constexpr int kN = 4;  // more would not fit in the registers of enough threads
  if (args.rows * args.batch * args.channels == 0) return cudaSuccess;
  const bool fit = args.channels % kN == 0 && Fits<kN>(args.x) && Fits<kN>(to.dy) && Fits<kN>(to.dx) &&
                   Aligned(args.halo) && Aligned(to.dhalo);
  cudaError_t error = VisitShape<T, kN>(args, fit, [&]<int N, int K>() {
    BackwardKernel<T, N, K><<<Grid<N>(args), kThreads, 0, stream>>>(args, to);
    return cudaGetLastError();
  });
  const int64_t parts = args.tiles.chunks() * args.batch;
  if (error == cudaSuccess) error = AddParts(to.scratch, parts, args.channels * args.k, to.dw, stream);
  if (error == cudaSuccess && to.dbias != nullptr) {
    error = AddParts(to.scratch + parts * args.channels * args.k, parts, args.channels, to.dbias, stream);
  }
  return error;
}

#define ANNULUS_INSTANTIATE(T)                                                                     \
  template cudaError_t CudaConv1dForward(const CudaConv1dArgs<T>&, StridedRows<T>, cudaStream_t);  \
  template cudaError_t CudaConv1dBackward(const CudaConv1dArgs<T>&, const CudaConv1dGradients<T>&, \
                                          cudaStream_t)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(__nv_bfloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
