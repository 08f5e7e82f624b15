#include "annulus/parallel/mask.h"

#include <gtest/gtest.h>

#include <numeric>

#include "annulus/comm/exchange_build.h"
#include "parallel/sequences.h"

namespace annulus::testing {
namespace {

// A random layout, batch and window.
struct Draw {
  SequenceLayout layout;
  SequenceBatch sequences;
  int64_t window;
};

Draw MakeDraw(uint64_t seed) {
  const RandomStream random(seed, "mask draws");
  const int64_t length = 1 + static_cast<int64_t>(random.Below(0, 40));
  const int ranks = 1 + static_cast<int>(random.Below(1, 8));
  const int64_t batch = 1 + static_cast<int64_t>(random.Below(2, 3));
  const Lengths lengths = random.Below(3, 2) == 0 ? Lengths::kFull : Lengths::kRandom;
  const Documents documents = random.Below(4, 2) == 0 ? Documents::kNone : Documents::kRandom;
  const int64_t window = random.Below(5, 2) == 0 ? 0 : 1 + static_cast<int64_t>(random.Below(6, 12));
  Draw draw{SequenceLayout(kLayouts[random.Below(7, 3)], length, ranks),
            RandomSequences(seed, length, batch, lengths, documents), window};
  if (random.Below(8, 2) == 0) draw.sequences.visibility = Visibility::kFull;
  return draw;
}

constexpr uint64_t kDraws = 300;

TEST(VisibleKeys, AreThoseOfThePairwiseMask) {
  for (uint64_t seed = 0; seed < kDraws; ++seed) {
    const Draw draw = MakeDraw(seed);
    for (int64_t item = 0; item < draw.sequences.batch; ++item) {
      for (int64_t q = 0; q < draw.layout.padded_length(); ++q) {
        const KeyRange keys = VisibleKeys(draw.sequences, draw.window, item, q);
        for (int64_t k = 0; k < draw.layout.padded_length(); ++k) {
          ASSERT_EQ(keys.lo <= k && k < keys.hi, Sees(draw.sequences, draw.window, item, q, k))
              << "draw " << seed << ", item " << item << ", query " << q << ", key " << k;
        }
      }
    }
  }
}

TEST(VisiblePairs, AreCountedOneByOne) {
  for (uint64_t seed = 0; seed < kDraws; ++seed) {
    const Draw draw = MakeDraw(seed);
    int64_t pairs = 0;
    for (int64_t item = 0; item < draw.sequences.batch; ++item) {
      for (int64_t q = 0; q < draw.layout.length(); ++q) {
        for (int64_t k = 0; k < draw.layout.length(); ++k)
          pairs += Sees(draw.sequences, draw.window, item, q, k);
      }
    }
    EXPECT_EQ(VisiblePairs(draw.sequences, draw.window), pairs) << "draw " << seed;
  }
}

// By hand: documents of 3, 1 and 2 tokens and 1 of padding.
TEST(VisibleKeys, OfDocumentsOnBothSides) {
  SequenceBatch sequences{.batch = 1, .lengths = {6}, .document_starts = {{0, 0, 0, 3, 4, 4, 6}}};
  const auto ranges = [&](int64_t window) {
    std::vector<std::pair<int64_t, int64_t>> all;
    for (int64_t position = 0; position < 7; ++position) {
      const KeyRange keys = VisibleKeys(sequences, window, 0, position);
      all.emplace_back(keys.lo, keys.hi);
    }
    return all;
  };
  using Ranges = std::vector<std::pair<int64_t, int64_t>>;
  EXPECT_EQ(ranges(0), (Ranges{{0, 1}, {0, 2}, {0, 3}, {3, 4}, {4, 5}, {4, 6}, {0, 0}}));
  sequences.visibility = Visibility::kFull;
  EXPECT_EQ(ranges(0), (Ranges{{0, 3}, {0, 3}, {0, 3}, {3, 4}, {4, 6}, {4, 6}, {0, 0}}));
  EXPECT_EQ(ranges(2), (Ranges{{0, 2}, {0, 3}, {1, 3}, {3, 4}, {4, 6}, {4, 6}, {0, 0}}));
}

// Plans of masks that look both ways compute each pair once, and move every block everywhere.
TEST(ExchangeProblem, OfFullMasksHasAPlan) {
  constexpr int64_t kLength = 120;  // no padding on any number of ranks, zigzag or not
  for (const LayoutKind kind : kLayouts) {
    for (int ranks = 1; ranks <= 6; ++ranks) {
      const SequenceLayout layout(kind, kLength, ranks);
      SequenceBatch sequences{.batch = 1, .lengths = {kLength}, .document_starts = {}};
      sequences.visibility = Visibility::kFull;
      const ExchangeProblem problem = MakeExchangeProblem(layout, sequences, 0, 2, 1);
      for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
        const ExchangePlan plan = BuildPlan(problem, pass, {.kind = PlanKind::kKvRing}).value();
        EXPECT_TRUE(Validate(plan).ok()) << NameOf(kind) << ", " << ranks << ": " << Validate(plan);
        for (int r = 0; r < ranks; ++r) {
          EXPECT_EQ(RowsSent(plan, r)[static_cast<size_t>(Payload::kKv)], (ranks - 1) * problem.block_rows)
              << NameOf(kind) << " " << r;
        }
      }
    }
  }
}

TEST(LocalBounds, AreThoseOfTheRowsInOrder) {
  for (uint64_t seed = 0; seed < kDraws; ++seed) {
    const Draw draw = MakeDraw(seed);
    const int64_t rows = draw.layout.local_rows(), batch = draw.sequences.batch;
    for (int r = 0; r < draw.layout.ranks(); ++r) {
      const BoundsTable table = LocalBounds(draw.layout, draw.sequences, draw.window, r);
      ASSERT_EQ(static_cast<int64_t>(table.lo.size()), rows * batch);
      ASSERT_EQ(static_cast<int64_t>(table.hi.size()), rows * batch);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t item = 0; item < batch; ++item) {
          const int64_t q = draw.layout.PositionOf(r, row);
          for (int64_t k = 0; k < draw.layout.padded_length(); ++k) {
            const size_t token = static_cast<size_t>(row * batch + item);
            const bool in_bounds = table.lo[token] <= k && k < table.hi[token];
            ASSERT_EQ(in_bounds, Sees(draw.sequences, draw.window, item, q, k)) << "draw " << seed;
          }
        }
      }
    }
  }
}

// What the cell (q_chunk, kv_chunk) of the problem must say, counted pair by pair.
struct Cell {
  RowRange hull;
  int64_t pairs = 0;
};

Cell CountCell(const Draw& draw, const Chunk& q, const Chunk& kv) {
  Cell cell;
  for (int64_t item = 0; item < draw.sequences.batch; ++item) {
    for (int64_t i = q.rows.begin; i < q.rows.end; ++i) {
      for (int64_t j = kv.rows.begin; j < kv.rows.end; ++j) {
        if (!Sees(draw.sequences, draw.window, item, draw.layout.PositionOf(q.owner, i),
                  draw.layout.PositionOf(kv.owner, j))) {
          continue;
        }
        cell.hull = cell.pairs == 0 ? RowRange{j, j + 1}
                                    : RowRange{std::min(cell.hull.begin, j), std::max(cell.hull.end, j + 1)};
        ++cell.pairs;
      }
    }
  }
  return cell;
}

TEST(ExchangeProblem, HoldsHullsAndPairCounts) {
  for (uint64_t seed = 0; seed < kDraws; ++seed) {
    SCOPED_TRACE(::testing::Message() << "draw " << seed);
    const Draw draw = MakeDraw(seed);
    const int parts = 1 + static_cast<int>(seed % 4);
    const ExchangeProblem problem =
        MakeExchangeProblem(draw.layout, draw.sequences, draw.window, 6, 3, parts);
    ASSERT_EQ(problem.heads, 6);
    ASSERT_EQ(problem.kv_heads, 3);
    ASSERT_EQ(problem.ranks, draw.layout.ranks());
    ASSERT_EQ(problem.block_rows, draw.layout.local_rows());
    ASSERT_EQ(problem.chunks.size(),
              draw.layout.chunks(0).size() * static_cast<size_t>(problem.ranks * parts));
    ASSERT_EQ(problem.keys.size(), problem.chunks.size() * problem.chunks.size());
    ASSERT_EQ(problem.pairs.size(), problem.keys.size());
    for (size_t i = 0; i < problem.chunks.size(); ++i) {
      for (size_t j = 0; j < problem.chunks.size(); ++j) {
        const Cell cell = CountCell(draw, problem.chunks[i], problem.chunks[j]);
        ASSERT_EQ(problem.pairs_of(i, j), cell.pairs) << "chunks " << i << ", " << j;
        ASSERT_EQ(problem.keys_of(i, j).empty(), cell.pairs == 0) << "chunks " << i << ", " << j;
        if (cell.pairs > 0) {
          ASSERT_EQ(problem.keys_of(i, j), cell.hull) << "chunks " << i << ", " << j;
        }
      }
    }
  }
}

// In time that does not grow with the length, which is the longest of a configuration here.
TEST(ExchangeProblem, OfTheLongestSequenceIsMadeAtOnce) {
  const int64_t length = int64_t{1} << 30, window = 1000;
  const SequenceBatch whole{.batch = 1, .lengths = {length}, .document_starts = {}};
  for (const LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kZigzag, LayoutKind::kStriped}) {
    const SequenceLayout layout(kind, length, 4);
    const auto pairs_with = [&](int64_t width) {
      const ExchangeProblem problem = MakeExchangeProblem(layout, whole, width, 1, 1, 2);
      return std::accumulate(problem.pairs.begin(), problem.pairs.end(), int64_t{0});
    };
    EXPECT_EQ(pairs_with(0), length * (length + 1) / 2);
    EXPECT_EQ(pairs_with(window), length * window - window * (window - 1) / 2);
  }
}

// Each layout chunk in parts whose sizes differ by one at most, empty where there are more parts than rows.
TEST(ExchangeProblem, CutsChunksInParts) {
  for (uint64_t seed = 0; seed < kDraws; ++seed) {
    SCOPED_TRACE(::testing::Message() << "draw " << seed);
    const Draw draw = MakeDraw(seed);
    const int parts = 1 + static_cast<int>(seed % 7);
    const ExchangeProblem problem =
        MakeExchangeProblem(draw.layout, draw.sequences, draw.window, 1, 1, parts);
    auto chunk = problem.chunks.begin();
    for (int r = 0; r < draw.layout.ranks(); ++r) {
      for (const LayoutChunk& whole : draw.layout.chunks(r)) {
        int64_t row = whole.row;
        for (int part = 0; part < parts; ++part, ++chunk) {
          EXPECT_EQ(chunk->owner, r);
          EXPECT_EQ(chunk->part, part);
          EXPECT_EQ(chunk->rows.begin, row);
          EXPECT_GE(chunk->rows.size(), whole.rows / parts);
          EXPECT_LE(chunk->rows.size(), (whole.rows + parts - 1) / parts);
          if (!chunk->rows.empty()) {
            EXPECT_EQ(chunk->position, draw.layout.PositionOf(r, row));
          }
          row = chunk->rows.end;
        }
        EXPECT_EQ(row, whole.row + whole.rows);
      }
    }
  }
}

}  // namespace
}  // namespace annulus::testing
