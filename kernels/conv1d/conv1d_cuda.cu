// A thread walks along the rows of a tile with N channels, the last K of them in its registers as a ring:
// every element is read once and, at the edges of tiles, again. Rows arrive through shared memory, of which
// each thread has a ring of its own that it fills some rows ahead: 12 rows of 16 bytes of each thread are on
// their way, more than registers would hold. Blocks of rows of one document take no tests row by row.
//
// Floors, elements moved per element of x: forward 2, backward 3. Per element the forward issues 13
// instructions and the backward 30, at k = 4 0.42 and 0.6 of what their memory takes. Both run at memory
// speed (on H200 93% and 95% of a copy's): what is left are the rows at edges of tiles, which are read twice,
// and the partial sums of dw.

#include "kernels/common/async_copy.cuh"
#include "kernels/common/parts.cuh"
#include "kernels/common/sigmoid.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/conv1d/conv1d_cuda.h"

namespace annulus::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kRingRows = 16;  // of a thread in shared memory

// Rows at a time: the registers' ring, whose slots are then known when the code is compiled.
template <int K>
constexpr int kBlockRows = K <= 4 ? 4 : 8;

// Channels of a thread. The backward holds four times as much of each in registers.
template <typename T>
constexpr int kForwardN = 16 / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kBackwardN = 8 / static_cast<int>(sizeof(T));

// What a thread works on: N channels of one item in one tile; rows count from the tile's first. K: at least
// k.
template <typename T, int N, int K>
struct Lane {
  const CudaConv1dArgs<T>& args;
  int64_t part, item, channel;  // part: of all tiles of all items
  ChunkRows tile;
  int rows, rows_left;  // of the tile, and from its first to the segment's end

  __device__ explicit Lane(const CudaConv1dArgs<T>& a) : args(a) {
    const int64_t groups = (a.channels + kThreads * N - 1) / (kThreads * N);
    part = blockIdx.x / groups;
    item = part % a.batch;
    channel = (blockIdx.x % groups * kThreads + threadIdx.x) * N;
    tile = ChunkAt(a.tiles, part / a.batch);
    rows = static_cast<int>(tile.end - tile.begin);
    rows_left = static_cast<int>(min(tile.segment_end - tile.begin, int64_t{rows} + K));
  }

  // This thread's channels of the tile's first row.
  template <typename U>
  __device__ U* First(const StridedRows<U>& x) const {
    return x.data + tile.begin * x.row_stride + item * x.batch_stride + channel;
  }
  // Where the halo has `row`, which lies before the segment; negative: nowhere.
  __device__ int64_t HaloOffset(int64_t row) const {
    const int64_t halo_row = args.k - 1 + tile.begin + row - tile.segment_begin;
    if (halo_row < 0) return -1;
    return ((tile.segment * int64_t{args.k - 1} + halo_row) * args.batch + item) * args.channels + channel;
  }
  // A row before the tile, in it or in the halo; zeros where there is none.
  __device__ Pack<T, N> LoadBefore(int row) const {
    if (tile.begin + row >= tile.segment_begin) return LoadPack<N>(First(args.x) + row * args.x.row_stride);
    const int64_t offset = HaloOffset(row);
    if (offset < 0) return {};
    return LoadPack<N>(args.halo + offset);
  }
  __device__ int Age(int row) const { return args.ages[(tile.begin + row) * args.batch + item]; }
  // Taps of a row that lie in its document; none past the segment.
  __device__ int Taps(int row) const { return row < rows_left ? min(args.k, Age(row) + 1) : 0; }
  // Of the last row of a block that begins at `begin`: since ages go up by one in a document, it tells
  // whether all taps of the whole block lie in it.
  __device__ int LastAge(int begin) const {
    const int last = begin + kBlockRows<K> - 1;
    return last < rows && args.k == K ? Age(last) : -1;
  }
  static __device__ bool IsWhole(int last_age) { return last_age >= kBlockRows<K> - 1 + K - 1; }

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

// Rows of one operand in order, kBlock at a time. A thread reads only what it has copied itself. Where
// elements go one by one they are read when they are taken.
template <typename T, int N, int kBlock>
class RowStream {
 public:
  static constexpr bool kCopies = N > 1;
  static constexpr int kStages = kRingRows / kBlock;
  static constexpr int kRowBytes = N * static_cast<int>(sizeof(T));  // of a thread
  static constexpr int kSharedBytes = kCopies ? kRingRows * kThreads * kRowBytes : 16;

  // first: the thread's channels of row 0; rows: that exist from there on
  __device__ RowStream(char* shared, const T* first, int64_t stride, int rows)
      : slots_(shared + threadIdx.x * kRowBytes), next_(first), stride_(stride), rows_(rows) {}

  // Blocks are started in order, each as a group of copies of all streams.
  __device__ void Start(int block) {
    if constexpr (kCopies) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        CopyAsync<kRowBytes>(SharedAddress(Slot(block, i)), next_, block * kBlock + i < rows_);
        next_ += stride_;
      }
    }
  }
  // Row i of a block that is there; zeros past the last.
  __device__ Pack<T, N> Row(int block, int i) const {
    if constexpr (kCopies) return LoadPack<N>(reinterpret_cast<const T*>(Slot(block, i)));
    const int row = block * kBlock + i;
    if (row >= rows_) return {};
    return LoadPack<N>(next_ + row * stride_);
  }

 private:
  __device__ char* Slot(int block, int i) const {
    return slots_ + (block % kStages * kBlock + i) * kThreads * kRowBytes;
  }

  char* const slots_;
  const T* next_;
  const int64_t stride_;
  const int rows_;
};

// Starts the first blocks of all streams.
template <typename Stream, typename... Streams>
__device__ void StartStreams(Stream& first, Streams&... others) {
#pragma unroll
  for (int block = 0; block < Stream::kStages - 1; ++block) {
    first.Start(block);
    (others.Start(block), ...);
    CopyAsyncCommit();
  }
}
// Waits for a block and starts the one that takes the place of the block before it, which must be done with.
template <typename Stream, typename... Streams>
__device__ void NextBlock(int block, Stream& first, Streams&... others) {
  CopyAsyncWait<Stream::kStages - 2>();
  first.Start(block + Stream::kStages - 1);
  (others.Start(block + Stream::kStages - 1), ...);
  CopyAsyncCommit();
}

// Taps of a row that count: all K, or as many as the document has.
enum class Rows { kWhole, kAny };

// Ring of the last rows in registers: row i of a block, and i - kBlockRows<K> of the one before, is in slot
// i.
template <int N, int K>
struct Window {
  static constexpr int kSlots = kBlockRows<K>;
  float x[kSlots][N] = {};

  static constexpr __device__ int Slot(int row) { return (row + kSlots) % kSlots; }
  template <typename T>
  __device__ void Set(int row, const Pack<T, N>& pack) {
#pragma unroll
    for (int n = 0; n < N; ++n) x[Slot(row)][n] = pack[n];
  }
  // u = bias + sum over taps of w x
  template <Rows kRows>
  __device__ void Apply(const float (&w)[K][N], const float (&bias)[N], int row, int taps,
                        float (&u)[N]) const {
#pragma unroll
    for (int n = 0; n < N; ++n) u[n] = bias[n];
#pragma unroll
    for (int j = 0; j < K; ++j) {
      if (kRows == Rows::kAny && j >= taps) continue;
#pragma unroll
      for (int n = 0; n < N; ++n) u[n] = fmaf(w[j][n], x[Slot(row - j)][n], u[n]);
    }
  }
};

template <typename T, int N, int K>
__global__ void __launch_bounds__(kThreads)
    ForwardKernel(const __grid_constant__ CudaConv1dArgs<T> args, const StridedRows<T> out) {
  constexpr int kBlock = kBlockRows<K>;
  using Stream = RowStream<T, N, kBlock>;
  __shared__ alignas(16) char shared[Stream::kSharedBytes];
  const Lane<T, N, K> lane(args);
  if (lane.channel >= args.channels) return;
  Stream xs(shared, lane.First(args.x), args.x.row_stride, lane.rows);
  StartStreams(xs);
  float w[K][N], bias[N];
  lane.LoadWeights(w, bias);
  Window<N, K> window;
#pragma unroll
  for (int row = 1 - K; row < 0; ++row) window.Set(row, lane.LoadBefore(row));
  T* to = lane.First(out);
  int last_age = lane.LastAge(0);
  for (int begin = 0, block = 0; begin < lane.rows; begin += kBlock, ++block) {
    NextBlock(block, xs);
    const auto output = [&]<Rows kRows>() {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        window.Set(i, xs.Row(block, i));
        const int taps = kRows == Rows::kWhole ? K : lane.Taps(begin + i);
        float u[N];
        window.template Apply<kRows>(w, bias, i, taps, u);
#pragma unroll
        for (int n = 0; n < N; ++n) u[n] *= Sigmoid<T>(u[n]);
        if (kRows == Rows::kWhole || begin + i < lane.rows) StorePack<N>(PackOf<T>(u), to);
        to += out.row_stride;
      }
    };
    const bool whole = lane.IsWhole(last_age);
    last_age = lane.LastAge(begin + kBlock);
    if (whole) {
      output.template operator()<Rows::kWhole>();
    } else {
      output.template operator()<Rows::kAny>();
    }
  }
}

// Weights, their gradients, and the gradients of the last rows: those of K - 1 rows may still get some.
template <typename T, int N, int K>
struct BackwardLane {
  using Slots = Window<N, K>;
  float w[K][N], bias[N], dw[K][N] = {}, dbias[N] = {};
  Slots window;
  float dx[Slots::kSlots][N] = {};  // as window.x

  // own: whether the row's share of dw belongs to this tile
  template <Rows kRows>
  __device__ void Row(int row, int taps, bool own, const Pack<T, N>& dy) {
    float du[N];
    window.template Apply<kRows>(w, bias, row, taps, du);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float s = Sigmoid<T>(du[n]);
      du[n] = dy[n] * s * fmaf(du[n], 1.0f - s, 1.0f);
      if (kRows == Rows::kWhole || own) dbias[n] += du[n];
      dx[row][n] = 0;
    }
#pragma unroll
    for (int j = 0; j < K; ++j) {
      if (kRows == Rows::kAny && j >= taps) continue;
      const int slot = Slots::Slot(row - j);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        dx[slot][n] = fmaf(w[j][n], du[n], dx[slot][n]);
        if (kRows == Rows::kWhole || own) dw[j][n] = fmaf(du[n], window.x[slot][n], dw[j][n]);
      }
    }
  }
  // Of the row that is done with `row`.
  __device__ Pack<T, N> Done(int row) const { return PackOf<T>(dx[Slots::Slot(row - (K - 1))]); }
};

// With u recomputed:  du = dy silu'(u)     dx[t - j] += w_j du[t]     dw_j += du[t] x[t - j]
//                     dbias += du[t]
// Row t is done once du[t + K - 1] is: the walk goes K - 1 rows past the tile, whose own sums of dw leave
// those rows out. Rows before a segment are its halo's.
//   scratch: [tiles, batch, channels, k], then [tiles, batch, channels]
template <typename T, int N, int K>
__global__ void __launch_bounds__(kThreads)
    BackwardKernel(const __grid_constant__ CudaConv1dArgs<T> args,
                   const __grid_constant__ CudaConv1dGradients<T> to) {
  constexpr int kBlock = kBlockRows<K>;
  using Stream = RowStream<T, N, kBlock>;
  __shared__ alignas(16) char shared[2][Stream::kSharedBytes];
  const Lane<T, N, K> lane(args);
  if (lane.channel >= args.channels) return;
  Stream xs(shared[0], lane.First(args.x), args.x.row_stride, lane.rows_left);
  Stream dys(shared[1], lane.First(to.dy), to.dy.row_stride, lane.rows_left);
  StartStreams(xs, dys);
  BackwardLane<T, N, K> own;
  lane.LoadWeights(own.w, own.bias);
#pragma unroll
  for (int row = 1 - K; row < 0; ++row) own.window.Set(row, lane.LoadBefore(row));
  T* dx = lane.First(to.dx) - (K - 1) * to.dx.row_stride;
  int last_age = lane.LastAge(0);
  for (int begin = 0, block = 0; begin < lane.rows + K - 1; begin += kBlock, ++block) {
    NextBlock(block, xs, dys);
    const auto rows = [&]<Rows kRows>() {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        own.window.Set(i, xs.Row(block, i));
        const int done = begin + i - (K - 1);
        if constexpr (kRows == Rows::kWhole) {
          own.template Row<kRows>(i, K, true, dys.Row(block, i));
          StorePack<N>(own.Done(i), dx);
        } else {
          own.template Row<kRows>(i, lane.Taps(begin + i), begin + i < lane.rows, dys.Row(block, i));
          if (0 <= done && done < lane.rows) {
            StorePack<N>(own.Done(i), dx);
          } else if (lane.tile.first && done < 0 && lane.HaloOffset(done) >= 0) {
            StorePack<N>(own.Done(i), to.dhalo + lane.HaloOffset(done));
          }
        }
        dx += to.dx.row_stride;
      }
    };
    const bool whole = begin > 0 && lane.IsWhole(last_age);
    last_age = lane.LastAge(begin + kBlock);
    if (whole) {
      rows.template operator()<Rows::kWhole>();
    } else {
      rows.template operator()<Rows::kAny>();
    }
  }
  float* dw_part = to.scratch + (lane.part * args.channels + lane.channel) * args.k;
  float* dbias_part =
      to.scratch +
      (args.tiles.first_chunk[args.tiles.count] * args.batch * args.k + lane.part) * args.channels +
      lane.channel;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int j = 0; j < K; ++j) {
      if (j < args.k) dw_part[n * args.k + args.k - 1 - j] = own.dw[j][n];
    }
    dbias_part[n] = own.dbias[n];
  }
}

// Calls fn<N, K>() with kN, or one by one; K: taps it has registers for.
template <int kN, typename T, typename Fn>
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

// CTAs side by side take neighbouring channels of the same rows.
template <int N, typename T, typename... To>
cudaError_t Launch(void (*kernel)(CudaConv1dArgs<T>, To...), const CudaConv1dArgs<T>& args,
                   cudaStream_t stream, const To&... to) {
  const int64_t blocks = args.tiles.chunks() * args.batch * CeilDiv(args.channels, kThreads * N);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  kernel<<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(args, to...);
  return cudaGetLastError();
}

// Rows on whole vectors.
template <int N, typename T>
bool Fits(const StridedRows<T>& x) {
  return reinterpret_cast<uintptr_t>(x.data) % (N * sizeof(T)) == 0 && x.row_stride % N == 0 &&
         x.batch_stride % N == 0;
}

}  // namespace

// Halves the tiles until the device is full of threads; they do not depend on which device it is.
ConvTileRows CudaConv1dTileRows(int64_t rows, int64_t batch, int64_t channels) {
  constexpr int64_t kThreadsWanted = 132 * 1024;
  const auto fill = [&](int64_t most, int64_t thread_channels) {
    int64_t tile = most;
    while (tile > 16 && rows * batch * channels < kThreadsWanted * tile * thread_channels) tile /= 2;
    return tile;
  };
  return {.forward = fill(128, kForwardN<__nv_bfloat16>), .backward = fill(512, kBackwardN<__nv_bfloat16>)};
}

template <typename T>
cudaError_t CudaConv1dForward(const CudaConv1dArgs<T>& args, StridedRows<T> y, cudaStream_t stream) {
  if (args.rows * args.batch * args.channels == 0) return cudaSuccess;
  constexpr int kN = kForwardN<T>;
  const bool fit = args.channels % kN == 0 && Fits<kN>(args.x) && Fits<kN>(y) && Aligned(args.halo);
  return VisitShape<kN>(args, fit,
                        [&]<int N, int K>() { return Launch<N>(ForwardKernel<T, N, K>, args, stream, y); });
}

template <typename T>
cudaError_t CudaConv1dBackward(const CudaConv1dArgs<T>& args, const CudaConv1dGradients<T>& to,
                               cudaStream_t stream) {
  if (args.rows * args.batch * args.channels == 0) return cudaSuccess;
  constexpr int kN = kBackwardN<T>;
  const bool fit = args.channels % kN == 0 && Fits<kN>(args.x) && Fits<kN>(to.dy) && Fits<kN>(to.dx) &&
                   Aligned(args.halo) && Aligned(to.dhalo);
  const cudaError_t error = VisitShape<kN>(
      args, fit, [&]<int N, int K>() { return Launch<N>(BackwardKernel<T, N, K>, args, stream, to); });
  const int64_t parts = args.tiles.chunks() * args.batch;
  if (error != cudaSuccess) return error;
  const int64_t bias_channels = to.dbias != nullptr ? args.channels : 0;
  return AddParts(parts, {to.scratch, args.channels * args.k, to.dw},
                  {to.scratch + parts * args.channels * args.k, bias_channels, to.dbias}, stream);
}

#define ANNULUS_INSTANTIATE(T)                                                                     \
  template cudaError_t CudaConv1dForward(const CudaConv1dArgs<T>&, StridedRows<T>, cudaStream_t);  \
  template cudaError_t CudaConv1dBackward(const CudaConv1dArgs<T>&, const CudaConv1dGradients<T>&, \
                                          cudaStream_t)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(__nv_bfloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
