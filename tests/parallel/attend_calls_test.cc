// Every (query, key) pair that a mask allows is in exactly one call of the whole group for each head, with
// the bounds that the call's kernel reads; and where libraries without bounds can serve a block, the calls
// say so.

#include "annulus/parallel/attend_calls.h"

#include <gtest/gtest.h>

#include <array>
#include <map>

#include "annulus/comm/exchange_build.h"
#include "annulus/parallel/device_bounds.h"
#include "parallel/sequences.h"

namespace annulus::testing {
namespace {

constexpr int64_t kHeads = 3;

struct Drawn {
  SequenceLayout layout;
  SequenceBatch sequences;
  int64_t window;
};

ExchangePlan PlanOf(const Drawn& c, Pass pass, const PlanChoice& choice) {
  return BuildPlan(MakeExchangeProblem(c.layout, c.sequences, c.window, kHeads, 1, ChunkParts(choice)), pass,
                   choice)
      .value();
}

// Global positions of a slot's rows, found row by row.
std::vector<int64_t> PositionsOf(const Drawn& c, const ExchangePlan& plan, const SlotSpec& slot,
                                 const SlotBlock& rows) {
  std::vector<int64_t> positions(static_cast<size_t>(SlotRows(plan, slot)), -1);
  for (const Chunk& chunk : plan.problem.chunks) {
    if (SlotBlockOf(plan, slot.span, chunk.owner) != rows) continue;
    for (int64_t row = chunk.rows.begin; row < chunk.rows.end; ++row) {
      const int64_t at = RowInSlot(plan, slot, {chunk.owner, {row, row + 1}});
      positions[static_cast<size_t>(at)] = c.layout.PositionOf(chunk.owner, row);
    }
  }
  return positions;
}

// Checks each pair of a call against the mask; counts how often a head sees a (item, query, key).
class PairCounter {
 public:
  PairCounter(const Drawn& c, const ExchangePlan& plan)
      : c_(c), plan_(plan), padded_(c.layout.padded_length()) {
    seen_.resize(static_cast<size_t>(kHeads * c.sequences.batch * padded_ * padded_));
  }

  void AddRank(int cp_rank) {
    Context ctx{Device{}};
    const RankPlan& rank = plan_.ranks[static_cast<size_t>(cp_rank)];
    std::vector<std::vector<AttendCall>> calls;
    for (const Step& step : rank.steps) {
      calls.push_back(step.kind == StepKind::kAttend
                          ? CallsOf(c_.layout, c_.sequences, plan_, cp_rank, step.attend)
                          : std::vector<AttendCall>());
    }
    DeviceBounds bounds;
    bounds.Fill(ctx, c_.sequences.batch, calls, [&](const SlotBlock& rows) {
      return BoundsOf(c_.layout, c_.sequences, c_.window, plan_, rows);
    });
    for (size_t s = 0; s < calls.size(); ++s) {
      for (const AttendCall& call : calls[s]) AddCall(rank, rank.steps[s].attend, call, bounds.Of(call));
    }
  }

  void ExpectEachPairOnce() const {
    const int64_t pairs = padded_ * padded_;
    for (size_t i = 0; i < seen_.size(); ++i) {
      const int64_t item = static_cast<int64_t>(i) / pairs % c_.sequences.batch;
      const int64_t q = static_cast<int64_t>(i) % pairs / padded_, k = static_cast<int64_t>(i) % padded_;
      ASSERT_EQ(seen_[i], Sees(c_.sequences, c_.window, item, q, k) ? 1 : 0)
          << "head " << static_cast<int64_t>(i) / pairs / c_.sequences.batch << ", item " << item << ", " << q
          << " " << k;
    }
  }

 private:
  void AddCall(const RankPlan& rank, const Attend& attend, const AttendCall& call, const MaskBounds& bounds) {
    const SlotSpec& q_slot = rank.slots[static_cast<size_t>(attend.q_slot)];
    const SlotSpec& kv_slot = rank.slots[static_cast<size_t>(attend.kv_slot)];
    const int kv_owner = plan_.problem.chunks[static_cast<size_t>(attend.pairs[0].kv_chunk)].owner;
    const std::vector<int64_t> queries = PositionsOf(c_, plan_, q_slot, call.queries);
    const std::vector<int64_t> keys =
        PositionsOf(c_, plan_, kv_slot, SlotBlockOf(plan_, kv_slot.span, kv_owner));
    const HeadGroup& group = plan_.groups[static_cast<size_t>(q_slot.group)];
    ExpectRowsOfPairs(attend, q_slot, kv_slot, call);
    const int64_t batch = c_.sequences.batch;
    const int64_t *lo = bounds.lo.data<int64_t>(), *hi = bounds.hi.data<int64_t>();
    for (int64_t i = 0; i < call.q_rows.size(); ++i) {
      const int64_t query = queries[static_cast<size_t>(call.q_rows.begin + i)];
      for (int64_t item = 0; item < batch; ++item) {
        int64_t visible = 0;
        for (int64_t j = 0; j < call.keys.size(); ++j) {
          const int64_t position = call.key_positions.offset + call.key_positions.stride * j;
          if (position < lo[i * batch + item] || position >= hi[i * batch + item]) continue;
          ++visible;
          const int64_t key = keys[static_cast<size_t>(call.keys.begin + j)];
          for (int64_t head = group.q_begin; head < group.q_end; ++head) {
            ++seen_[static_cast<size_t>(((head * batch + item) * padded_ + query) * padded_ + key)];
          }
        }
        if (call.shape == MaskShape::kGeneral) continue;
        EXPECT_EQ(visible, call.shape == MaskShape::kFull ? call.keys.size() : i + 1);
      }
    }
  }

  // Rows of the slots that belong to no pair of the step may hold anything: no call touches them.
  void ExpectRowsOfPairs(const Attend& attend, const SlotSpec& q_slot, const SlotSpec& kv_slot,
                         const AttendCall& call) const {
    std::vector<BlockRows> q_rows, kv_rows;
    for (const BlockPair& pair : attend.pairs) {
      const Chunk& q = plan_.problem.chunks[static_cast<size_t>(pair.q_chunk)];
      q_rows.push_back({q.owner, q.rows});
      kv_rows.push_back({plan_.problem.chunks[static_cast<size_t>(pair.kv_chunk)].owner, pair.keys});
    }
    const auto inside = [](const RowRange& rows, const std::vector<RowRange>& of) {
      return std::any_of(of.begin(), of.end(), [&](const RowRange& range) {
        return range.begin <= rows.begin && rows.end <= range.end;
      });
    };
    EXPECT_TRUE(inside(call.q_rows, RowsInSlot(plan_, q_slot, q_rows)));
    EXPECT_TRUE(inside(call.keys, RowsInSlot(plan_, kv_slot, kv_rows)));
  }

  const Drawn& c_;
  const ExchangePlan& plan_;
  const int64_t padded_;
  std::vector<int> seen_;  // [head, item, query, key]
};

void ExpectEachPairOnce(const Drawn& c, Pass pass, const PlanChoice& choice) {
  const ExchangePlan plan = PlanOf(c, pass, choice);
  PairCounter counter(c, plan);
  for (int rank = 0; rank < c.layout.ranks(); ++rank) counter.AddRank(rank);
  counter.ExpectEachPairOnce();
}

TEST(AttendCalls, ComputeEachPairOnce) {
  uint64_t seed = 0;
  for (const LayoutKind kind : kLayouts) {
    for (int ranks = 1; ranks <= 6; ++ranks) {
      for (PlanChoice choice : AllChoices(ranks, kHeads)) {
        choice.parts = 1 + static_cast<int>(seed % 3);
        const Documents documents = seed % 2 ? Documents::kRandom : Documents::kNone;
        const Lengths lengths = seed % 5 < 2 ? Lengths::kRandom : Lengths::kFull;
        const int64_t window = std::array<int64_t, 5>{0, 0, 1, 5, 40}[seed % 5];
        const int64_t length = 23 + static_cast<int64_t>(seed % 3);
        ++seed;
        Drawn c{SequenceLayout(kind, length, ranks), RandomSequences(seed, length, 2, lengths, documents),
                window};
        if (seed % 7 < 2) c.sequences.visibility = Visibility::kFull;
        SCOPED_TRACE(::testing::Message() << NameOf(kind) << ", " << NameOf(choice, ranks) << " on " << ranks
                                          << ", seed " << seed);
        ExpectEachPairOnce(c, seed % 2 ? Pass::kForward : Pass::kBackward, choice);
      }
    }
  }
}

// Rows of the arena that come together, or are there, lie apart at the positions that are said, and have all
// keys that the rank's queries see; those of messages come first, in their order.
TEST(AttendCalls, PartsOfAnArenaHaveAllKeys) {
  uint64_t seed = 0;
  for (const LayoutKind kind : kLayouts) {
    for (const int ranks : {2, 3, 5}) {
      for (const int parts : {1, 2}) {
        const Documents documents = seed % 2 ? Documents::kRandom : Documents::kNone;
        const int64_t window = std::array<int64_t, 3>{0, 5, 40}[seed % 3];
        ++seed;
        const Drawn c{SequenceLayout(kind, 41, ranks),
                      RandomSequences(seed, 41, 2, Lengths::kFull, documents), window};
        const ExchangePlan plan = PlanOf(c, Pass::kForward, {.kind = PlanKind::kArena, .parts = parts});
        for (int r = 0; r < ranks; ++r) {
          SCOPED_TRACE(::testing::Message()
                       << NameOf(kind) << ", rank " << r << " of " << ranks << ", seed " << seed);
          const RankPlan& rank = plan.ranks[static_cast<size_t>(r)];
          const Step& attend = rank.steps.back();
          const SlotSpec& arena = rank.slots[static_cast<size_t>(attend.attend.kv_slot)];
          const std::vector<int64_t> positions = PositionsOf(c, plan, arena, {Span::kSuper, 0});
          const ArrivingCall arriving = ArrivingCallOf(c.layout, plan, r, attend);
          EXPECT_EQ(arriving.call.q_rows, (RowRange{0, c.layout.local_rows()}));
          for (size_t i = 0; i < attend.after.size(); ++i) {
            const Step& receive = rank.steps[static_cast<size_t>(attend.after[i])];
            EXPECT_EQ(arriving.parts[i].rows.begin, RowInSlot(plan, arena, receive.rows));
            EXPECT_EQ(arriving.parts[i].rows.size(), receive.rows.rows.size());
          }
          std::vector<int> there(static_cast<size_t>(c.layout.padded_length()));  // by position
          for (const KeyPart& part : arriving.parts) {
            for (int64_t row = part.rows.begin; row < part.rows.end; ++row) {
              const int64_t position = positions[static_cast<size_t>(row)];
              EXPECT_EQ(part.positions.offset + part.positions.stride * (row - part.rows.begin), position);
              EXPECT_EQ(++there[static_cast<size_t>(position)], 1);
            }
          }
          for (const int64_t query : c.layout.LocalPositions(r)) {
            for (int64_t key = 0; key < c.layout.padded_length(); ++key) {
              for (int64_t item = 0; item < 2; ++item) {
                const bool seen = Sees(c.sequences, c.window, item, query, key);
                EXPECT_TRUE(!seen || there[static_cast<size_t>(key)] == 1) << query << " sees " << key;
              }
            }
          }
        }
      }
    }
  }
}

Drawn Causal(LayoutKind kind, int64_t length, int ranks, int64_t window = 0) {
  return {
      SequenceLayout(kind, length, ranks), {.batch = 1, .lengths = {length}, .document_starts = {}}, window};
}

std::vector<AttendCall> AllCalls(const Drawn& c, int rank, const PlanChoice& choice) {
  const ExchangePlan plan = PlanOf(c, Pass::kForward, choice);
  std::vector<AttendCall> all;
  for (const Step& step : plan.ranks[static_cast<size_t>(rank)].steps) {
    if (step.kind != StepKind::kAttend) continue;
    for (const AttendCall& call : CallsOf(c.layout, c.sequences, plan, rank, step.attend))
      all.push_back(call);
  }
  return all;
}

// One causal call on the own block, then one full call a visited block.
TEST(AttendCalls, CausalZigzagIsOneCallABlock) {
  for (const PlanKind kind : {PlanKind::kKvRing, PlanKind::kDirectCast}) {
    for (int ranks = 1; ranks <= 6; ++ranks) {
      const Drawn c = Causal(LayoutKind::kZigzag, 48 * ranks, ranks);
      for (int rank = 0; rank < ranks; ++rank) {
        const std::vector<AttendCall> calls = AllCalls(c, rank, {.kind = kind});
        ASSERT_EQ(calls.size(), static_cast<size_t>(ranks)) << Name(kind);
        EXPECT_EQ(calls[0].shape, MaskShape::kCausal);
        EXPECT_EQ(calls[0].q_rows, (RowRange{0, c.layout.local_rows()}));
        for (size_t i = 1; i < calls.size(); ++i) {
          EXPECT_EQ(calls[i].shape, MaskShape::kFull);
          // A lower rank's first half for all queries, or all of a higher rank's block for the second half.
          EXPECT_EQ(calls[i].q_rows.size() * calls[i].keys.size(),
                    c.layout.local_rows() * c.layout.local_rows() / 2);
        }
      }
    }
  }
}

// The queries of a visiting block take one full call too.
TEST(AttendCalls, CausalZigzagIsOneCallAVisit) {
  for (int ranks = 2; ranks <= 6; ++ranks) {
    const Drawn c = Causal(LayoutKind::kZigzag, 48 * ranks, ranks);
    for (int rank = 0; rank < ranks; ++rank) {
      std::map<int, int> visits;
      for (const AttendCall& call : AllCalls(c, rank, {.kind = PlanKind::kTokenRing})) {
        EXPECT_NE(call.shape, MaskShape::kGeneral);
        ++visits[call.queries.index];
      }
      for (const auto& [block, calls] : visits) {
        if (block == rank) continue;
        EXPECT_EQ(calls, 1) << "block " << block << " on rank " << rank;
      }
      EXPECT_EQ(visits.size(), static_cast<size_t>(ranks));
    }
  }
}

// Rows of a super-block are in order of position: all of a causal sequence is one causal call, and two
// super-blocks meet like two blocks.
TEST(AttendCalls, CausalSuperBlocksAreOneCallEach) {
  for (const LayoutKind kind : {LayoutKind::kZigzag, LayoutKind::kContiguous}) {
    for (const int ranks : {2, 3}) {
      const Drawn c = Causal(kind, 24 * ranks, ranks);
      for (int rank = 0; rank < ranks; ++rank) {
        const std::vector<AttendCall> calls = AllCalls(c, rank, {.head_split = ranks});
        ASSERT_EQ(calls.size(), 1u) << NameOf(kind);
        EXPECT_EQ(calls[0].shape, MaskShape::kCausal);
        EXPECT_EQ(calls[0].q_rows, (RowRange{0, c.layout.padded_length()}));
      }
    }
    const Drawn c = Causal(kind, 96, 4);
    for (int rank = 0; rank < 4; ++rank) {
      for (const AttendCall& call : AllCalls(c, rank, {.kind = PlanKind::kKvRing, .head_split = 2})) {
        EXPECT_NE(call.shape, MaskShape::kGeneral) << NameOf(kind) << " rank " << rank;
      }
    }
  }
}

// The parts of a block that travel on their own are not next to each other in a zigzag block.
TEST(AttendCalls, PartsOfCausalBlocksNeedNoBounds) {
  for (const PlanKind kind : {PlanKind::kBidirectionalKvRing, PlanKind::kBidirectionalTokenRing}) {
    const Drawn c = Causal(LayoutKind::kZigzag, 96, 4);
    for (int rank = 0; rank < 4; ++rank) {
      for (const AttendCall& call : AllCalls(c, rank, {.kind = kind, .parts = 2})) {
        EXPECT_NE(call.shape, MaskShape::kGeneral) << Name(kind) << " rank " << rank;
      }
    }
  }
}

// Striped blocks of lower ranks look causal too: query row i comes after key row i and before the next.
TEST(AttendCalls, StripedBlocksOfLowerRanksAreCausal) {
  const Drawn c = Causal(LayoutKind::kStriped, 96, 4);
  for (int rank = 0; rank < 4; ++rank) {
    const std::vector<AttendCall> calls = AllCalls(c, rank, {.kind = PlanKind::kKvRing});
    ASSERT_EQ(calls.size(), 4u);
    EXPECT_EQ(std::count_if(calls.begin(), calls.end(),
                            [](const AttendCall& call) { return call.shape == MaskShape::kCausal; }),
              rank + 1);
  }
}

TEST(AttendCalls, AWindowIsGeneralAndOneCallOnOneRank) {
  const std::vector<AttendCall> calls = AllCalls(Causal(LayoutKind::kZigzag, 64, 1, 10), 0, {});
  ASSERT_EQ(calls.size(), 1u);
  EXPECT_EQ(calls[0].shape, MaskShape::kGeneral);
  EXPECT_EQ(calls[0].bounds, BoundsSource::kMask);
}

}  // namespace
}  // namespace annulus::testing
