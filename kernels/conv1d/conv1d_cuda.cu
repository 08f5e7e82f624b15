// A thread walks along the rows of a tile with N channels, the last k - 1 rows in its registers: every
// element is read once and, at the edges of tiles, again out of the caches. Rows come four at a time, the
// next four while these are worked on; four whole rows of one document take no tests. Floors, elements moved
// per element of x: forward 2, backward 3. Per element the forward computes about k + 8 instructions and the
// backward 3 k + 15, which at k = 4 is 0.4 and 0.6 of what their memory takes.

#include "kernels/common/parts.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/conv1d/conv1d_cuda.h"

namespace annulus::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kAhead = 4;  // rows at a time
constexpr int kN = 4;      // channels of a thread, where rows allow it: more leave room for fewer threads

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
  // -1 past the segment: no tap counts there.
  __device__ int Age(int64_t row) const {
    return row < tile.segment_end ? args.ages[row * args.batch + item] : -1;
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

// What is loaded of four rows.
template <typename T, int N>
struct RowsAhead {
  Pack<T, N> x[kAhead], dy[kAhead];
  int age[kAhead];
};

// x of four rows and the K - 1 before them, in f32; row i is x[K - 1 + i].
template <typename T, int N, int K>
struct Window {
  float x[K - 1 + kAhead][N];
  __device__ void Set(int at, const Pack<T, N>& row) {
#pragma unroll
    for (int n = 0; n < N; ++n) x[at][n] = row[n];
  }
  __device__ void Shift() {
#pragma unroll
    for (int i = 0; i < K - 1; ++i) {
#pragma unroll
      for (int n = 0; n < N; ++n) x[i][n] = x[kAhead + i][n];
    }
  }
};

// Taps of a row that count: all K, or as many as the document has.
enum class Rows { kWhole, kAny };

// u = bias + sum over taps of w x
template <Rows kRows, typename T, int N, int K>
__device__ void Apply(const float (&w)[K][N], const float (&bias)[N], const Window<T, N, K>& window, int row,
                      int taps, float (&u)[N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) u[n] = bias[n];
#pragma unroll
  for (int j = 0; j < K; ++j) {
    if (kRows == Rows::kAny && j >= taps) continue;
#pragma unroll
    for (int n = 0; n < N; ++n) u[n] = fmaf(w[j][n], window.x[K - 1 + row - j][n], u[n]);
  }
}

template <typename T, int N, int K>
__global__ void __launch_bounds__(kThreads)
    ForwardKernel(const __grid_constant__ CudaConv1dArgs<T> args, const StridedRows<T> out) {
  const Lane<T, N, K> lane(args);
  if (lane.channel >= args.channels) return;
  const int64_t end = lane.tile.end;
  float w[K][N], bias[N];
  lane.LoadWeights(w, bias);
  Window<T, N, K> window;
#pragma unroll
  for (int i = 0; i < K - 1; ++i) window.Set(i, lane.Load(lane.tile.begin - (K - 1) + i));
  const auto load = [&](int64_t begin, RowsAhead<T, N>* ahead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      ahead->x[i] = lane.Load(begin + i);
      ahead->age[i] = lane.Age(begin + i);
    }
  };
  RowsAhead<T, N> ahead;
  load(lane.tile.begin, &ahead);
  T* to = out.data + lane.tile.begin * out.row_stride + lane.item * out.batch_stride + lane.channel;
  for (int64_t begin = lane.tile.begin; begin < end; begin += kAhead) {
    int taps[kAhead];
    bool whole = begin + kAhead <= end && args.k == K;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      window.Set(K - 1 + i, ahead.x[i]);
      taps[i] = min(args.k, ahead.age[i] + 1);
      whole = whole && taps[i] == K;
    }
    if (begin + kAhead < end) load(begin + kAhead, &ahead);
    const auto output = [&]<Rows kRows>() {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        float u[N];
        Apply<kRows>(w, bias, window, i, taps[i], u);
#pragma unroll
        for (int n = 0; n < N; ++n) u[n] *= Sigmoid<T>(u[n]);
        if (kRows == Rows::kWhole || begin + i < end) StorePack<N>(PackOf<T>(u), to);
        to += out.row_stride;
      }
    };
    if (whole) {
      output.template operator()<Rows::kWhole>();
    } else {
      output.template operator()<Rows::kAny>();
    }
    window.Shift();
  }
}

// The gradient of four rows, of which rows before may still get some.
template <typename T, int N, int K>
struct BackwardLane {
  float w[K][N], bias[N], dw[K][N] = {}, dbias[N] = {};
  Window<T, N, K> window;
  float dx[K - 1 + kAhead][N] = {};  // as window.x

  // own: whether the row's share of dw belongs to this tile
  template <Rows kRows>
  __device__ void Row(int row, int taps, bool own, const Pack<T, N>& dy) {
    float du[N];
    Apply<kRows>(w, bias, window, row, taps, du);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float s = Sigmoid<T>(du[n]);
      du[n] = dy[n] * (s + du[n] * s * (1.0f - s));
      if (kRows == Rows::kWhole || own) dbias[n] += du[n];
    }
#pragma unroll
    for (int j = 0; j < K; ++j) {
      if (kRows == Rows::kAny && j >= taps) continue;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float& to = dx[K - 1 + row - j][n];
        to = fmaf(w[j][n], du[n], to);
        if (kRows == Rows::kWhole || own) dw[j][n] = fmaf(du[n], window.x[K - 1 + row - j][n], dw[j][n]);
      }
    }
  }
  __device__ void Shift() {
    window.Shift();
#pragma unroll
    for (int i = 0; i < K - 1 + kAhead; ++i) {
#pragma unroll
      for (int n = 0; n < N; ++n) dx[i][n] = i < K - 1 ? dx[kAhead + i][n] : 0;
    }
  }
};

// With u recomputed:  du = dy silu'(u)     dx[t - j] += w_j du[t]     dw_j += du[t] x[t - j]     dbias +=
// du[t] Row t is done once du[t + K - 1] is: the walk goes K - 1 rows past the tile, whose own sums of dw
// leave those rows out. Rows before a segment are its halo's.
//   scratch: [tiles, batch, channels, k], then [tiles, batch, channels]
template <typename T, int N, int K>
__global__ void __launch_bounds__(kThreads)
    BackwardKernel(const __grid_constant__ CudaConv1dArgs<T> args,
                   const __grid_constant__ CudaConv1dGradients<T> to) {
  const Lane<T, N, K> lane(args);
  if (lane.channel >= args.channels) return;
  const ChunkRows& tile = lane.tile;
  const int64_t end = tile.end + K - 1;
  BackwardLane<T, N, K> own;
  lane.LoadWeights(own.w, own.bias);
#pragma unroll
  for (int i = 0; i < K - 1; ++i) own.window.Set(i, lane.Load(tile.begin - (K - 1) + i));
  const auto load = [&](int64_t begin, RowsAhead<T, N>* ahead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      ahead->x[i] = lane.Load(begin + i);
      ahead->age[i] = lane.Age(begin + i);
      ahead->dy[i] = {};
      if (begin + i >= tile.segment_end) continue;
      ahead->dy[i] = LoadPack<N>(to.dy.data + (begin + i) * to.dy.row_stride +
                                 lane.item * to.dy.batch_stride + lane.channel);
    }
  };
  RowsAhead<T, N> ahead;
  load(tile.begin, &ahead);
  for (int64_t begin = tile.begin; begin < end; begin += kAhead) {
    int taps[kAhead];
    Pack<T, N> dy[kAhead];
    bool whole = begin + kAhead <= tile.end && args.k == K;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      own.window.Set(K - 1 + i, ahead.x[i]);
      dy[i] = ahead.dy[i];
      taps[i] = min(args.k, ahead.age[i] + 1);
      whole = whole && taps[i] == K;
    }
    if (begin + kAhead < end) load(begin + kAhead, &ahead);
    if (whole) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) own.template Row<Rows::kWhole>(i, K, true, dy[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) own.template Row<Rows::kAny>(i, taps[i], begin + i < tile.end, dy[i]);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t done = begin + i - (K - 1);
      if (tile.begin <= done && done < tile.end) {
        StorePack<N>(PackOf<T>(own.dx[i]),
                     to.dx.data + done * to.dx.row_stride + lane.item * to.dx.batch_stride + lane.channel);
      } else if (tile.first && done < tile.begin && lane.HaloRow(done) >= 0) {
        StorePack<N>(PackOf<T>(own.dx[i]), to.dhalo + lane.HaloOffset(done));
      }
    }
    own.Shift();
  }
  float* dw_part = to.scratch + (blockIdx.x * args.channels + lane.channel) * args.k;
  float* dbias_part = to.scratch + (int64_t{gridDim.x} * args.k + blockIdx.x) * args.channels + lane.channel;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int j = 0; j < K; ++j) {
      if (j < args.k) dw_part[n * args.k + args.k - 1 - j] = own.dw[j][n];
    }
    dbias_part[n] = own.dbias[n];
  }
}

// Calls fn<N, K>(): channels of a thread, taps it has registers for.
template <typename T, typename Fn>
cudaError_t VisitShape(const CudaConv1dArgs<T>& args, bool vectors_fit, Fn&& fn) {
  if (args.k < 1 || args.k > kMaxConvTaps) return cudaErrorInvalidValue;
  if (!vectors_fit) {
    return args.k <= 4 ? fn.template operator()<1, 4>() : fn.template operator()<1, kMaxConvTaps>();
  }
  if (args.k <= 2) return fn.template operator()<kN, 2>();
  if (args.k == 3) return fn.template operator()<kN, 3>();
  if (args.k == 4) return fn.template operator()<kN, 4>();
  return fn.template operator()<kN, kMaxConvTaps>();
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
  return {.forward = fill(128, kN), .backward = fill(512, kN)};
}

template <typename T>
cudaError_t CudaConv1dForward(const CudaConv1dArgs<T>& args, StridedRows<T> y, cudaStream_t stream) {
  if (args.rows * args.batch * args.channels == 0) return cudaSuccess;
  const bool fit = args.channels % kN == 0 && Fits<kN>(args.x) && Fits<kN>(y) && Aligned(args.halo);
  return VisitShape(args, fit, [&]<int N, int K>() {
    ForwardKernel<T, N, K><<<Grid<N>(args), kThreads, 0, stream>>>(args, y);
    return cudaGetLastError();
  });
}

template <typename T>
cudaError_t CudaConv1dBackward(const CudaConv1dArgs<T>& args, const CudaConv1dGradients<T>& to,
                               cudaStream_t stream) {
  if (args.rows * args.batch * args.channels == 0) return cudaSuccess;
  const bool fit = args.channels % kN == 0 && Fits<kN>(args.x) && Fits<kN>(to.dy) && Fits<kN>(to.dx) &&
                   Aligned(args.halo) && Aligned(to.dhalo);
  cudaError_t error = VisitShape(args, fit, [&]<int N, int K>() {
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
