#include "annulus/parallel/sequence_layout.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "parallel/sequences.h"

namespace annulus::testing {
namespace {

class Layouts : public ::testing::TestWithParam<LayoutKind> {};

INSTANTIATE_TEST_SUITE_P(Kinds, Layouts, ::testing::ValuesIn(kLayouts),
                         [](const auto& info) { return NameOf(info.param); });

// Calls fn(layout, row_multiple) for every length, number of ranks and multiple that the properties are shown
// for.
template <typename Fn>
void ForEachLayout(LayoutKind kind, Fn&& fn) {
  for (int64_t length = 1; length <= 50; ++length) {
    for (int ranks = 1; ranks <= 8; ++ranks) {
      for (const int multiple : {1, 2, 3, 4}) {
        SCOPED_TRACE(::testing::Message() << "length " << length << ", ranks " << ranks << " x " << multiple);
        fn(SequenceLayout(kind, length, ranks, multiple), multiple);
      }
    }
  }
}

TEST_P(Layouts, AreBijections) {
  ForEachLayout(GetParam(), [](const SequenceLayout& layout, int) {
    std::vector<int> seen(static_cast<size_t>(layout.padded_length()));
    for (int r = 0; r < layout.ranks(); ++r) {
      const std::vector<int64_t> positions = layout.LocalPositions(r);
      ASSERT_EQ(static_cast<int64_t>(positions.size()), layout.local_rows());
      for (int64_t row = 0; row < layout.local_rows(); ++row) {
        const int64_t position = layout.PositionOf(r, row);
        ASSERT_TRUE(0 <= position && position < layout.padded_length()) << position;
        ASSERT_EQ(positions[static_cast<size_t>(row)], position);
        ASSERT_EQ(layout.PlaceOf(position), (SequenceLayout::Place{r, row}));
        ++seen[static_cast<size_t>(position)];
      }
    }
    ASSERT_EQ(seen, std::vector<int>(seen.size(), 1));
  });
}

// Every position of the sequence has a place, and there is as little padding as equal chunks and the multiple
// of rows allow.
TEST_P(Layouts, PadAtTheEndOnly) {
  ForEachLayout(GetParam(), [](const SequenceLayout& layout, int multiple) {
    const auto chunks = static_cast<int64_t>(layout.chunks(0).size());
    const int64_t unit = std::lcm<int64_t>(chunks, multiple);
    ASSERT_GE(layout.padded_length(), layout.length());
    ASSERT_LT(layout.padded_length() - layout.length(), unit * layout.ranks());
    ASSERT_EQ(layout.local_rows() % unit, 0);
  });
}

TEST_P(Layouts, ChunksAreAffineAndCoverTheRows) {
  ForEachLayout(GetParam(), [](const SequenceLayout& layout, int) {
    for (int r = 0; r < layout.ranks(); ++r) {
      int64_t row = 0;
      for (const LayoutChunk& chunk : layout.chunks(r)) {
        ASSERT_EQ(chunk.row, row);
        ASSERT_EQ(chunk.rows, layout.chunks(0)[0].rows);
        for (int64_t i = 0; i < chunk.rows; ++i) {
          ASSERT_EQ(layout.PositionOf(r, chunk.row + i), chunk.position + chunk.stride * i);
        }
        row += chunk.rows;
      }
      ASSERT_EQ(row, layout.local_rows());
    }
  });
}

TEST(Layout, PlacesAreThoseOfThePicture) {
  const auto owners = [](LayoutKind kind) {
    const SequenceLayout layout(kind, 8, 2);
    std::string text;
    for (int64_t p = 0; p < 8; ++p) text += static_cast<char>('0' + layout.PlaceOf(p).cp_rank);
    return text;
  };
  EXPECT_EQ(owners(LayoutKind::kContiguous), "00001111");
  EXPECT_EQ(owners(LayoutKind::kZigzag), "00111100");
  EXPECT_EQ(owners(LayoutKind::kStriped), "01010101");
}

// Causal work, in pairs, of the busiest rank over the mean.
double Imbalance(LayoutKind kind, int64_t length, int ranks) {
  const SequenceLayout layout(kind, length, ranks);
  double total = 0, most = 0;
  for (int r = 0; r < ranks; ++r) {
    double pairs = 0;
    for (int64_t position : layout.LocalPositions(r)) pairs += static_cast<double>(position + 1);
    total += pairs;
    most = std::max(most, pairs);
  }
  return most * ranks / total;
}

TEST(Layout, ZigzagAndStripedBalanceCausalWork) {
  EXPECT_EQ(Imbalance(LayoutKind::kZigzag, 64, 4), 1.0);
  EXPECT_LT(Imbalance(LayoutKind::kStriped, 64, 4), 1.05);
  EXPECT_GT(Imbalance(LayoutKind::kContiguous, 64, 4), 1.7);
}

}  // namespace
}  // namespace annulus::testing
