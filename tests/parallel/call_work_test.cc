// What calls are priced by: whole tiles, the longest walk, and, of each tile of queries, the keys that its
// rows see one by one.

#include "annulus/parallel/call_work.h"

#include <gtest/gtest.h>

#include "../../src/parallel/keys_seen.h"
#include "annulus/comm/exchange_build.h"
#include "parallel/sequences.h"

namespace annulus::testing {
namespace {

TEST(WorkOf, CountsWholeTiles) {
  const AttentionTiles tiles{.queries = 4, .keys = 8};
  // One tile of keys; two, of which little is seen; none; two of which the first ends where keys begin.
  EXPECT_EQ(WorkOf(tiles, 1, 3, {{0, 8}, {7, 9}, {5, 5}, {16, 25}}), 3 * 4 * 8 * (1 + 2 + 0 + 2));
  EXPECT_EQ(WorkOf({}, 132, 2, {{0, 5}, {3, 4}}), 2 * 6) << "pairs, where tiles are not known";
}

TEST(WorkOf, EndsWithTheLastWalk) {
  const AttentionTiles tiles{.queries = 4, .keys = 8, .walks_per_multiprocessor = 2};
  const std::vector<QueryTileKeys> call = {{0, 8}, {0, 80}, {8, 16}};
  const double sum = 4 * 8 * (1 + 10 + 1), longest = 4 * 8 * 10;
  EXPECT_EQ(WorkOf(tiles, 10, 1, call), 2 * 10 * longest);
  EXPECT_EQ(WorkOf(tiles, 10, 100, call), 100 * sum + 10 * longest) << "many heads occupy the device";
  EXPECT_EQ(WorkOf(tiles, 0, 1, call), sum) << "of a device that is not known";
}

TEST(TilesOf, AreOfTheKernel) {
  const AttentionTiles forward = TilesOf(AttentionKernel::kTensorCore, Pass::kForward, 128),
                       backward = TilesOf(AttentionKernel::kTensorCore, Pass::kBackward, 128);
  EXPECT_GT(forward.queries, 1);
  EXPECT_GT(forward.walks_per_multiprocessor, 0);
  EXPECT_EQ(backward.walks_per_multiprocessor, 0) << "its walks are cut";
  EXPECT_EQ(TilesOf(AttentionKernel::kHopper, Pass::kForward, 64).queries, 192);
  EXPECT_EQ(TilesOf(AttentionKernel::kHopper, Pass::kBackward, 128).queries, 64);
  for (const AttentionKernel other :
       {AttentionKernel::kCpuTiles, AttentionKernel::kF32, AttentionKernel::kCudnn})
    EXPECT_EQ(TilesOf(other, Pass::kForward, 128).queries, 1);
}

// Row by row, from the bounds that the call's kernel reads.
QueryTileKeys Seen(const AttentionCase& layer, const ExchangePlan& plan, const AttendCall& call,
                   const RowRange& queries, int64_t item) {
  const BoundsTable bounds = BoundsOf(layer.layout, layer.sequences, layer.window, plan, call.queries);
  QueryTileKeys seen{call.keys.size(), 0};
  for (int64_t row = queries.begin; row < queries.end; ++row) {
    const auto at = static_cast<size_t>((call.q_rows.begin + row) * layer.sequences.batch + item);
    for (int64_t key = 0; key < call.keys.size(); ++key) {
      const int64_t position = call.key_positions.offset + call.key_positions.stride * key;
      const bool sees =
          call.shape == MaskShape::kFull || (call.shape == MaskShape::kCausal && key <= row) ||
          (call.shape == MaskShape::kGeneral && bounds.lo[at] <= position && position < bounds.hi[at]);
      if (!sees) continue;
      seen.begin = std::min(seen.begin, key);
      seen.end = std::max(seen.end, key + 1);
    }
  }
  return seen;
}

// Of every call of a plan. Returns how many have a mask of their own.
int CheckPlan(const AttentionCase& layer, const ExchangePlan& plan) {
  constexpr int64_t kTile = 4;
  // Of documents that are shorter than the stride a row may see no key where those around it do.
  const bool exact = layer.layout.chunks(0).front().stride == 1;
  KeysSeen keys(layer, plan);
  int general = 0;
  for (int rank = 0; rank < layer.layout.ranks(); ++rank) {
    for (const Step& step : plan.ranks[static_cast<size_t>(rank)].steps) {
      if (step.kind != StepKind::kAttend) continue;
      for (const AttendCall& call : CallsOf(layer.layout, layer.sequences, plan, rank, step.attend)) {
        const std::vector<QueryTileKeys> got = keys.By(call, kTile);
        general += call.shape == MaskShape::kGeneral;
        size_t at = 0;
        for (int64_t item = 0; item < layer.sequences.batch; ++item) {
          for (int64_t row = 0; row < call.q_rows.size(); row += kTile) {
            const QueryTileKeys want =
                Seen(layer, plan, call, {row, std::min(row + kTile, call.q_rows.size())}, item);
            if (!want.empty()) {
              EXPECT_LE(got[at].begin, want.begin) << "rank " << rank << ", row " << row;
              EXPECT_GE(got[at].end, want.end) << "rank " << rank << ", row " << row;
            }
            if (exact) {
              EXPECT_EQ(std::max<int64_t>(0, got[at].size()), std::max<int64_t>(0, want.size()));
            }
            ++at;
          }
        }
        EXPECT_EQ(at, got.size());
      }
    }
  }
  return general;
}

TEST(KeysSeen, AreThoseOfTheRows) {
  int general = 0;
  uint64_t seed = 0;
  for (const LayoutKind kind : kLayouts) {
    for (int ranks = 1; ranks <= 4; ++ranks) {
      for (const PlanChoice& choice : AllChoices(ranks, 2)) {
        const int64_t length = 8 * ranks * (1 + static_cast<int64_t>(seed % 4));
        const Documents documents = seed % 3 > 0 ? Documents::kRandom : Documents::kNone;
        const AttentionCase layer{
            .layout = SequenceLayout(kind, length, ranks),
            .sequences = RandomSequences(seed, length, 2, Lengths::kFull, documents),
            .heads = 2,
            .kv_heads = 1,
            .head_dim = 8,
            .v_head_dim = 8,
            .window = seed % 5 == 0 ? 7 : 0,
        };
        const ExchangePlan plan =
            BuildPlan(MakeExchangeProblem(layer.layout, layer.sequences, layer.window, layer.heads,
                                          layer.kv_heads, ChunkParts(choice)),
                      seed % 2 == 0 ? Pass::kForward : Pass::kBackward, choice)
                .value();
        SCOPED_TRACE(::testing::Message()
                     << NameOf(kind) << ", " << plan.name << " on " << ranks << ", seed " << seed);
        general += CheckPlan(layer, plan);
        ++seed;
      }
    }
  }
  EXPECT_GT(general, 100) << "calls with masks";
}

}  // namespace
}  // namespace annulus::testing
