#pragma once

// Decays between the rows of one chunk of a recurrence, of one head, on CPUs.
//
// That from row s to row t is e^(sum of a over (s, t]), 0 where a document starts in between. Sums are kept
// from the start of a row's document in the chunk, with what their rounding lost (Knuth's two-sum): they may
// be hundreds while the difference of two neighbours is small. The exponential is taken of differences s <= t
// of one document only, which are never positive.

#include <algorithm>
#include <limits>

#include "annulus/base/row_range.h"
#include "annulus/device/context.h"
#include "kernels/common/heads_cpu.h"
#include "kernels/common/vector_math.h"

namespace annulus::kernels {

// Rows are counted from the chunk's first here.
template <typename T>
class ChunkDecay {
 public:
  // a: [rows, batch, heads]   ages: i32 [rows, batch]   rows: of the longest chunk
  ChunkDecay(Context& ctx, const ConstTensorRef& a, const ConstTensorRef& ages, int64_t rows)
      : a_(a),
        ages_(ages),
        start_(ScratchElements<int64_t>(ctx, rows)),
        sum_(ScratchElements<T>(ctx, rows)),
        lost_(ScratchElements<T>(ctx, rows)) {}

  void SetRows(const RowRange& rows, int64_t item) {
    rows_ = rows;
    item_ = item;
    carried_ = rows.size();
    for (int64_t r = 0; r < rows.size(); ++r) {
      const bool starts = ages_.data<int32_t>()[(rows.begin + r) * a_.dim(1) + item] == 0;
      start_[r] = starts || r == 0 ? r : start_[r - 1];
      if (starts) carried_ = std::min(carried_, r);
    }
  }
  // After SetRows.
  void SetHead(int64_t head) {
    head_ = head;
    T sum = 0, lost = 0;
    for (int64_t r = 0; r < size(); ++r) {
      const T a = a_.data<T>()[Gate(r)], next = sum + a, added = next - sum;
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
  bool StartsDocument(int64_t row) const { return start_[row] == row && row >= carried_; }

  // Index in [rows, batch, heads].
  int64_t Gate(int64_t row) const { return ((rows_.begin + row) * a_.dim(1) + item_) * a_.dim(2) + head_; }

  // decays[s] = that from row s to `row`, for s in [start(row), row].
  void To(int64_t row, T* decays) const {
    const T sum = sum_[row], lost = lost_[row];
#pragma omp simd
    for (int64_t s = start_[row]; s <= row; ++s) decays[s] = Exp((sum - sum_[s]) + (lost - lost_[s]));
  }
  // 0 for rows that do not see the state before the chunk.
  T FromBefore(int64_t row) const { return row < carried_ ? Exp(sum_[row] + lost_[row]) : T{0}; }
  // 0 for rows that do not reach the state after it.
  T ToEnd(int64_t row) const {
    const int64_t end = size() - 1;
    return row < last() ? T{0} : Exp((sum_[end] - sum_[row]) + (lost_[end] - lost_[row]));
  }
  // Of the whole chunk: its logarithm, and itself.
  T Log() const {
    return carried_ < size() ? -std::numeric_limits<T>::infinity() : sum_[size() - 1] + lost_[size() - 1];
  }
  T Whole() const { return FromBefore(size() - 1); }

  // da of the rows from gradients of their sums: a row's a is in the sums of all later rows of its document.
  void StoreGradient(const double* dsum, T* da) const {
    double later = 0;
    for (int64_t r = size() - 1; r >= 0; --r) {
      later += dsum[r];
      const bool starts = StartsDocument(r);
      da[Gate(r)] = starts ? T{0} : static_cast<T>(later);
      if (starts) later = 0;
    }
  }

 private:
  const ConstTensorRef a_, ages_;
  RowRange rows_;
  int64_t item_ = 0, head_ = 0, carried_ = 0;
  int64_t* start_;  // [rows]
  T* sum_;          // [rows]
  T* lost_;         // [rows]: sum_ + lost_ is exact
};

}  // namespace annulus::kernels
