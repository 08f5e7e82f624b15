#pragma once

// Inside one chunk of annulus/ops/ssd.h on CPUs: decays between its rows, and products with lower triangular
// matrices [rows, rows], computed in panels of rows so that most of the upper half is left out.
//
// The decay from row s to row t is e^(sum of a over (s, t]), 0 where a document starts in between. Sums are
// kept from the start of a row's document in the chunk, with what their rounding lost (Knuth's two-sum): they
// may be hundreds while the difference of two neighbours is small. The exponential is taken of differences
// s <= t of one document only, which are never positive.

#include <algorithm>
#include <limits>

#include "annulus/ops/write.h"
#include "kernels/common/blas.h"
#include "kernels/common/heads_cpu.h"
#include "kernels/common/segments.h"
#include "kernels/common/vector_math.h"
#include "kernels/ssd/ssd_kernels.h"

namespace annulus::kernels {

template <typename T>
T* SsdScratch(Context& ctx, int64_t elements) {
  return ctx.scratch.Allocate(DTypeOf<T>(), {elements}).template data<T>();
}

// Rows of the longest chunk.
inline int64_t SsdLongestChunk(const Ssd& ssd) { return std::min(ssd.chunk, ssd.x.rows); }

// Rows are counted from the chunk's first here.
template <typename T>
class ChunkDecay {
 public:
  ChunkDecay(Context& ctx, const Ssd& ssd)
      : ssd_(ssd),
        start_(SsdScratch<int64_t>(ctx, SsdLongestChunk(ssd))),
        sum_(SsdScratch<T>(ctx, SsdLongestChunk(ssd))),
        lost_(SsdScratch<T>(ctx, SsdLongestChunk(ssd))) {}

  void SetRows(const RowRange& rows, int64_t item) {
    rows_ = rows;
    item_ = item;
    carried_ = rows.size();
    for (int64_t r = 0; r < rows.size(); ++r) {
      const bool starts = ssd_.ages.data<int32_t>()[(rows.begin + r) * ssd_.x.batch + item] == 0;
      start_[r] = starts || r == 0 ? r : start_[r - 1];
      if (starts) carried_ = std::min(carried_, r);
    }
  }
  // After SetRows.
  void SetHead(int64_t head) {
    head_ = head;
    T sum = 0, lost = 0;
    for (int64_t r = 0; r < size(); ++r) {
      const T a = ssd_.a.data<T>()[Gate(r)], next = sum + a, added = next - sum;
      lost += (sum - (next - added)) + (a - added);
      sum = next;
      if (StartsDocument(r)) sum = lost = 0;
      sum_[r] = sum;
      lost_[r] = lost;
    }
  }

  int64_t size() const { return rows_.size(); }
  int64_t carried() const { return carried_; }         // rows [0, carried) see the state before the chunk
  int64_t last() const { return start_[size() - 1]; }  // rows [last, size) reach the state after it
  int64_t start(int64_t row) const { return start_[row]; }  // rows [start, row] reach row

  // decays[s] = that from row s to `row`, for s in [start(row), row].
  void To(int64_t row, T* decays) const {
    const T sum = sum_[row], lost = lost_[row];
#pragma omp simd
    for (int64_t s = start_[row]; s <= row; ++s) decays[s] = Exp((sum - sum_[s]) + (lost - lost_[s]));
  }
  bool StartsDocument(int64_t row) const { return start_[row] == row && row >= carried_; }

  // Index in [rows, batch, heads].
  int64_t Gate(int64_t row) const {
    return ((rows_.begin + row) * ssd_.x.batch + item_) * ssd_.x.heads + head_;
  }
  T Dt(int64_t row) const { return ssd_.dt.defined() ? ssd_.dt.data<T>()[Gate(row)] : T{1}; }

  T FromBefore(int64_t row) const { return Exp(static_cast<T>(sum_[row])); }  // row < carried
  T ToEnd(int64_t row) const {                                                // row >= last
    const int64_t end = size() - 1;
    return Exp((sum_[end] - sum_[row]) + (lost_[end] - lost_[row]));
  }
  // Of the whole chunk.
  T Log() const {
    return carried_ < size() ? -std::numeric_limits<T>::infinity() : sum_[size() - 1] + lost_[size() - 1];
  }

 private:
  const Ssd& ssd_;
  RowRange rows_;
  int64_t item_ = 0, head_ = 0, carried_ = 0;
  int64_t* start_;  // [rows]
  T* sum_;          // [rows]
  T* lost_;         // [rows]: sum_ + lost_ is exact
};

// Head `head` of the chunk's rows from its row `first` on, as an operand or as what is written.
template <typename T, typename Byte>
auto* ChunkHead(const BasicHeadsRef<Byte>& x, const RowRange& rows, int64_t item, int64_t head,
                int64_t first = 0) {
  return HeadAt<T>(x, rows.begin + first, item, head);
}
// Strides mean nothing where there is one row.
template <typename Byte>
int64_t RowStride(const BasicHeadsRef<Byte>& x) {
  return std::max(x.row_stride, x.dim);
}

// A matrix as it lies in memory.
template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;
};

inline constexpr int64_t kPanelRows = 64;

// Calls fn(begin, end) with panels of [0, n).
template <typename Fn>
void ForEachPanel(int64_t n, Fn&& fn) {
  for (int64_t begin = 0; begin < n; begin += kPanelRows) fn(begin, std::min(begin + kPanelRows, n));
}

// lower[t, s] = a_t . b_s for s below the end of t's panel; a, b: [n, k]
template <typename T>
void LowerProduct(int64_t n, int64_t k, const Rows<const T>& a, const Rows<const T>& b,
                  const Rows<T>& lower) {
  ForEachPanel(n, [&](int64_t begin, int64_t end) {
    Gemm<T>({.m = end - begin,
             .n = end,
             .k = k,
             .a = {a.data + begin * a.stride, a.stride},
             .b = {b.data, b.stride, Transpose::kYes},
             .beta = 0,
             .c = lower.data + begin * lower.stride,
             .c_stride = lower.stride});
  });
}

// y (=, +=) lower x.   x, y: [n, columns]; lower: zeros above the diagonal inside panels
template <typename T>
void LowerTimes(int64_t n, int64_t columns, const Rows<const T>& lower, const Rows<const T>& x, Write write,
                const Rows<T>& y) {
  ForEachPanel(n, [&](int64_t begin, int64_t end) {
    Gemm<T>({.m = end - begin,
             .n = columns,
             .k = end,
             .a = {lower.data + begin * lower.stride, lower.stride},
             .b = {x.data, x.stride},
             .beta = write == Write::kAccumulate ? T{1} : T{0},
             .c = y.data + begin * y.stride,
             .c_stride = y.stride});
  });
}

// y (=, +=) lower^T x
template <typename T>
void LowerTransposedTimes(int64_t n, int64_t columns, const Rows<const T>& lower, const Rows<const T>& x,
                          Write write, const Rows<T>& y) {
  ForEachPanel(n, [&](int64_t begin, int64_t end) {
    Gemm<T>({.m = end - begin,
             .n = columns,
             .k = n - begin,
             .a = {lower.data + begin * lower.stride + begin, lower.stride, Transpose::kYes},
             .b = {x.data + begin * x.stride, x.stride},
             .beta = write == Write::kAccumulate ? T{1} : T{0},
             .c = y.data + begin * y.stride,
             .c_stride = y.stride});
  });
}

}  // namespace annulus::kernels
