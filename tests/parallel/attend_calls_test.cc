// Every (query, key) pair that a mask allows is in exactly one call of the whole group, with the bounds that
// the call's kernel reads; and where libraries without bounds can serve a block, the calls say so.

#include "annulus/parallel/attend_calls.h"

#include <gtest/gtest.h>

#include "parallel/sequences.h"

namespace annulus::testing {
namespace {

struct Drawn {
  SequenceLayout layout;
  SequenceBatch sequences;
  int64_t window;
};

// Adds one to seen[(item, query position, key position)] for each pair that the call's bounds allow.
void Count(const Drawn& c, int cp_rank, int owner, const AttendCall& call, const DeviceBounds& bounds,
           std::vector<int>* seen) {
  const MaskBounds rows = bounds.Of(call);
  const int64_t batch = c.sequences.batch, padded = c.layout.padded_length();
  const int64_t *lo = rows.lo.data<int64_t>(), *hi = rows.hi.data<int64_t>();
  for (int64_t i = 0; i < call.q_rows.size(); ++i) {
    const int64_t query = c.layout.PositionOf(cp_rank, call.q_rows.begin + i);
    for (int64_t item = 0; item < batch; ++item) {
      int64_t visible = 0;
      for (int64_t j = 0; j < call.keys.size(); ++j) {
        const int64_t position = call.key_positions.offset + call.key_positions.stride * j;
        if (position < lo[i * batch + item] || position >= hi[i * batch + item]) continue;
        ++visible;
        const int64_t key = c.layout.PositionOf(owner, call.keys.begin + j);
        ++(*seen)[static_cast<size_t>((item * padded + query) * padded + key)];
      }
      if (call.shape == MaskShape::kGeneral) continue;
      EXPECT_EQ(visible, call.shape == MaskShape::kFull ? call.keys.size() : i + 1);
    }
  }
}

void ExpectEachPairOnce(const Drawn& c, Pass pass) {
  const ExchangePlan plan = BuildKvRing(MakeExchangeProblem(c.layout, c.sequences, c.window), pass);
  const int64_t padded = c.layout.padded_length(), batch = c.sequences.batch;
  std::vector<int> seen(static_cast<size_t>(batch * padded * padded));
  Context ctx{Device{}};
  for (int rank = 0; rank < c.layout.ranks(); ++rank) {
    const BoundsTable table = LocalBounds(c.layout, c.sequences, c.window, rank);
    DeviceBounds bounds(Device{}, c.layout.local_rows(), batch);
    bounds.Fill(ctx, table);
    for (const Step& step : plan.ranks[static_cast<size_t>(rank)].steps) {
      for (const AttendCall& call : CallsOf(c.layout, plan.problem, step, table, batch)) {
        Count(c, rank, step.block, call, bounds, &seen);
      }
    }
  }
  for (int64_t item = 0; item < batch; ++item) {
    for (int64_t q = 0; q < padded; ++q) {
      for (int64_t k = 0; k < padded; ++k) {
        const int expected = Sees(c.sequences, c.window, item, q, k) ? 1 : 0;
        ASSERT_EQ(seen[static_cast<size_t>((item * padded + q) * padded + k)], expected)
            << item << " " << q << " " << k;
      }
    }
  }
}

TEST(AttendCalls, ComputeEachPairOnce) {
  uint64_t seed = 0;
  for (const LayoutKind kind : kLayouts) {
    for (int ranks = 1; ranks <= 5; ++ranks) {
      for (const int64_t window : {0, 1, 5, 40}) {
        for (const Documents documents : {Documents::kNone, Documents::kRandom}) {
          for (const Lengths lengths : {Lengths::kFull, Lengths::kRandom}) {
            const SequenceLayout layout(kind, 31 + static_cast<int64_t>(seed % 3), ranks);
            const SequenceBatch sequences = RandomSequences(++seed, layout.length(), 2, lengths, documents);
            SCOPED_TRACE(::testing::Message()
                         << NameOf(kind) << ", " << ranks << " ranks, window " << window);
            ExpectEachPairOnce({layout, sequences, window}, seed % 2 ? Pass::kForward : Pass::kBackward);
          }
        }
      }
    }
  }
}

std::vector<AttendCall> AllCalls(const SequenceLayout& layout, int rank, int64_t window) {
  const SequenceBatch sequences{.batch = 1, .lengths = {layout.length()}, .document_starts = {}};
  const ExchangePlan plan = BuildKvRing(MakeExchangeProblem(layout, sequences, window), Pass::kForward);
  const BoundsTable table = LocalBounds(layout, sequences, window, rank);
  std::vector<AttendCall> all;
  for (const Step& step : plan.ranks[static_cast<size_t>(rank)].steps) {
    for (const AttendCall& call : CallsOf(layout, plan.problem, step, table, 1)) all.push_back(call);
  }
  return all;
}

// One causal call on the own block, then one full call a visited block.
TEST(AttendCalls, CausalZigzagIsOneCallABlock) {
  for (int ranks = 1; ranks <= 6; ++ranks) {
    const SequenceLayout layout(LayoutKind::kZigzag, 48 * ranks, ranks);
    for (int rank = 0; rank < ranks; ++rank) {
      const std::vector<AttendCall> calls = AllCalls(layout, rank, 0);
      ASSERT_EQ(calls.size(), static_cast<size_t>(ranks));
      EXPECT_EQ(calls[0].shape, MaskShape::kCausal);
      EXPECT_EQ(calls[0].q_rows, (RowRange{0, layout.local_rows()}));
      for (size_t i = 1; i < calls.size(); ++i) {
        EXPECT_EQ(calls[i].shape, MaskShape::kFull);
        // Lower ranks' first half for all queries, or all of a higher rank's block for the second half.
        EXPECT_EQ(calls[i].q_rows.size() * calls[i].keys.size(),
                  layout.local_rows() * layout.local_rows() / 2);
      }
    }
  }
}

TEST(AttendCalls, AWindowIsGeneralAndOneCallOnOneRank) {
  const std::vector<AttendCall> calls = AllCalls(SequenceLayout(LayoutKind::kZigzag, 64, 1), 0, 10);
  ASSERT_EQ(calls.size(), 1u);
  EXPECT_EQ(calls[0].shape, MaskShape::kGeneral);
  EXPECT_EQ(calls[0].bounds, BoundsSource::kMask);
}

}  // namespace
}  // namespace annulus::testing
