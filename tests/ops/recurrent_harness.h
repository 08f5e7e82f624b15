#pragma once

// Inputs that the tests of ops along the sequence share: documents, segments and buffers of their ages.

#include "annulus/base/row_range.h"
#include "annulus/ops/state.h"
#include "ops/harness.h"

namespace annulus::testing {

// Ages [rows, batch] of documents of `length` tokens, which start at other rows in other items. The first row
// continues a document of at least seven tokens unless one starts there; length 0: it goes on to the end.
inline std::vector<int32_t> DocumentAges(int64_t rows, int64_t batch, int64_t length) {
  constexpr int64_t kBefore = 7, kShift = 3;
  std::vector<int32_t> ages;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t item = 0; item < batch; ++item) {
      const int64_t since = length > 0 ? (row + kShift * item) % length : row + kBefore;
      const bool first_goes_on = length > 0 && row < since;
      ages.push_back(static_cast<int32_t>(first_goes_on ? row + kBefore : since));
    }
  }
  return ages;
}

template <typename T>
std::vector<T> Absolute(std::vector<T> values) {
  for (T& x : values) x = std::abs(x);
  return values;
}

// Values in [low, high).
template <typename T>
std::vector<T> UniformValues(int64_t n, absl::string_view stream, double low, double high) {
  std::vector<T> values = NormalValues<T>(n, stream);
  for (T& x : values)
    x = static_cast<T>(low + (high - low) * 0.5 * std::erfc(-static_cast<double>(x) / std::sqrt(2.0)));
  return values;
}

// Rows [0, rows) in runs of the given lengths; the last takes what is left.
inline std::vector<RowRange> SegmentsOf(int64_t rows, const std::vector<int64_t>& lengths) {
  std::vector<RowRange> segments;
  int64_t begin = 0;
  for (const int64_t length : lengths) {
    segments.push_back({begin, std::min(begin + length, rows)});
    begin = segments.back().end;
  }
  segments.push_back({begin, rows});
  return segments;
}

// Rows of a sequence [rows, ...] that a rank holds, as one vector.
template <typename T>
std::vector<T> TakeRows(const std::vector<T>& all, int64_t width, const std::vector<RowRange>& rows) {
  std::vector<T> taken;
  for (const RowRange& range : rows) {
    taken.insert(taken.end(), all.begin() + range.begin * width, all.begin() + range.end * width);
  }
  return taken;
}

// Where the segments of a sequence are, in the order of positions.
struct SegmentPlace {
  size_t rank = 0;
  int64_t segment = 0;
};

// What state passing does between ranks: incoming[rank] gets the state at the start of each of its segments.
// For gradients, the order from the end and the transposed transition.
template <typename T>
void HandAlong(Context& ctx, const std::vector<SegmentPlace>& order, Transpose transpose,
               const std::vector<SegmentSummary>& summaries, const std::vector<TensorRef>& incoming) {
  const TensorRef& first = summaries[0].state;
  Guarded<T> state({1, first.dim(1), first.dim(2), first.dim(3)}, T{0});
  for (const SegmentPlace& at : order) {
    const auto slot = [&](const TensorRef& t) { return t.Rows(at.segment, at.segment + 1); };
    std::copy_n(state.data(), state.ref().elements(), slot(incoming[at.rank]).template data<T>());
    const SegmentSummary& summary = summaries[at.rank];
    ANNULUS_CHECK_OK(AdvanceState(ctx, slot(summary.transition), transpose, state.ref(), slot(summary.state),
                                  state.ref()));
  }
}

// A sequence of four segments in a zigzag over two ranks: which rows each has and where the segments are.
struct Zigzag {
  explicit Zigzag(int64_t segment_rows) : segment_rows_(segment_rows) {}
  std::vector<RowRange> RowsOf(size_t rank) const {
    return rank == 0 ? std::vector<RowRange>{Segment(0), Segment(3)}
                     : std::vector<RowRange>{Segment(1), Segment(2)};
  }
  std::vector<SegmentPlace> Order() const { return {{0, 0}, {1, 0}, {1, 1}, {0, 1}}; }
  std::vector<SegmentPlace> Reversed() const { return {{0, 1}, {1, 1}, {1, 0}, {0, 0}}; }
  int64_t rows() const { return 4 * segment_rows_; }

 private:
  RowRange Segment(int64_t i) const { return {i * segment_rows_, (i + 1) * segment_rows_}; }
  int64_t segment_rows_;
};

inline void ExpectClose(const std::vector<double>& got, const std::vector<double>& expected) {
  ASSERT_EQ(got.size(), expected.size());
  EXPECT_LE(MaxDifference(got, expected), 1e-13 * std::max(1.0, MaxAbs(expected)));
  EXPECT_GT(MaxAbs(expected), 0);
}

}  // namespace annulus::testing
