#pragma once

// What the plain kernels of annulus/ops/ssd.h share: decays of rows, scratch memory and the scan over chunks.

#include "kernels/ssd/batched_product.cuh"
#include "kernels/ssd/ssd_cuda.h"

namespace annulus::kernels {

// Of each row and head, [rows, batch * heads].
struct RowDecays {
  double* sums;       // of a from the start of the row's document or of the chunk, whichever is later
  float* from_start;  // from the state before the chunk, 0 where a document starts in between
  float* to_end;      // to the state after it, likewise
};

// Scratch memory of a call: row decays, then, for a slice of chunks, matrices [chunk, chunk] and
// [chunk, dim] of each head.
template <typename T>
struct PlainScratch {
  static constexpr int64_t kSliceBytes = int64_t{256} << 20;
  static constexpr int kSquares = 3, kPanels = 2;

  RowDecays decays = {};
  float* squares[kSquares] = {};
  float* panels[kPanels] = {};
  float* dskip = nullptr;  // [chunks, batch * heads]
  int64_t slice = 0;       // chunks
  int64_t bytes = 0;

  PlainScratch(const CudaSsd<T>& ssd, void* memory) {
    const int64_t gates = ssd.rows * ssd.all_heads(), chunk = Chunk(ssd), chunks = ssd.chunks.chunks();
    const int64_t square = ssd.all_heads() * chunk * chunk, panel = ssd.all_heads() * chunk * ssd.dim;
    const int64_t slice_bytes = 4 * (kSquares * square + kPanels * panel);
    slice =
        std::clamp<int64_t>(kSliceBytes / std::max<int64_t>(slice_bytes, 1), 1, std::max<int64_t>(chunks, 1));
    char* next = static_cast<char*>(memory);
    const auto take = [&](auto** to, int64_t elements) {
      *to = reinterpret_cast<std::remove_pointer_t<decltype(to)>>(next + bytes);
      bytes += CeilDiv(elements * static_cast<int64_t>(sizeof(**to)), 256) * 256;
    };
    take(&decays.sums, gates);
    take(&decays.from_start, gates);
    take(&decays.to_end, gates);
    take(&dskip, chunks * ssd.all_heads());
    for (float*& s : squares) take(&s, slice * square);
    for (float*& p : panels) take(&p, slice * panel);
  }
  // Rows of the longest chunk.
  static int64_t Chunk(const CudaSsd<T>& ssd) { return std::min(ssd.chunks.chunk, ssd.rows); }
};

// One head of one chunk; rows are counted from the chunk's first here.
template <typename T>
struct HeadChunk {
  const CudaSsd<T>& ssd;
  const RowDecays& decays;
  int64_t chunk, item, head;
  ChunkRows rows;

  __device__ HeadChunk(const CudaSsd<T>& s, const RowDecays& d, int64_t c, int64_t index)
      : ssd(s),
        decays(d),
        chunk(c),
        item(index / s.heads),
        head(index % s.heads),
        rows(ChunkAt(s.chunks, c)) {}

  __device__ int64_t size() const { return rows.end - rows.begin; }
  __device__ int64_t group() const { return head / (ssd.heads / ssd.groups); }
  __device__ int64_t Index() const { return chunk * ssd.batch * ssd.heads + item * ssd.heads + head; }
  __device__ int64_t Gate(int64_t row) const {
    return ((rows.begin + row) * ssd.batch + item) * ssd.heads + head;
  }
  __device__ int64_t Age(int64_t row) const { return ssd.ages[(rows.begin + row) * ssd.batch + item]; }
  __device__ float Dt(int64_t row) const { return ssd.dt != nullptr ? ssd.dt[Gate(row)] : 1.0f; }
  template <typename U>
  __device__ U* At(const StridedRows<U>& x, int64_t row, int64_t of_head, int64_t dim) const {
    return x.data + (rows.begin + row) * x.row_stride + item * x.batch_stride + of_head * dim;
  }
  __device__ float X(int64_t row, int64_t p) const { return ToFloat(At(ssd.x, row, head, ssd.dim)[p]); }
  __device__ float B(int64_t row, int64_t n) const { return ToFloat(At(ssd.b, row, group(), ssd.state)[n]); }
  __device__ float C(int64_t row, int64_t n) const { return ToFloat(At(ssd.c, row, group(), ssd.state)[n]); }
  __device__ float Of(const StridedRows<const T>& y, int64_t row, int64_t p) const {
    return ToFloat(At(y, row, head, ssd.dim)[p]);
  }
  // e^(sum of a over (s, t]), 0 unless s <= t lies in the document of t.
  __device__ float Decay(int64_t t, int64_t s) const {
    if (s > t || t - s > Age(t)) return 0;
    return expf(static_cast<float>(decays.sums[Gate(t)] - decays.sums[Gate(s)]));
  }
};

// kSummarise: to summary.state the state after each segment's chunks (kForward: from its first to its last;
// kBackward: the other way), from zero. kReplace: from `initial`; each chunk's gets what was before it.
enum class ScanOrder { kForward, kBackward };
enum class ScanMode { kSummarise, kReplace };
struct ScanArgs {
  SegmentTable chunks;
  int64_t heads = 0, elements = 0;  // batch * heads; of a state
  const float* decays = nullptr;    // [chunks, heads]
  float* states = nullptr;          // [chunks, heads, elements]
  const float* initial = nullptr;   // [segments, heads, elements], null: 0
  float* transition = nullptr;      // [segments, heads]
  float* state = nullptr;           // [segments, heads, elements]
};
cudaError_t ScanChunks(ScanOrder order, ScanMode mode, const ScanArgs& args, cudaStream_t stream);

// Fills scratch.decays; decays, if not null, gets the logarithm of each chunk's decay.
template <typename T>
cudaError_t FillRowDecays(const CudaSsd<T>& ssd, const RowDecays& to, float* decays, cudaStream_t stream);

// c b^T times decays, into square matrices [slice, batch * heads, chunk, chunk]; kYes: also times dt.
enum class TimesDt { kNo, kYes };
template <typename T>
cudaError_t FillScores(const CudaSsd<T>& ssd, const RowDecays& decays, TimesDt times_dt, int64_t first_chunk,
                       int64_t chunks, float* scores, cudaStream_t stream);

}  // namespace annulus::kernels
