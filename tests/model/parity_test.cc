// The same numbers on any mesh, layout and recompute policy.

#include <gtest/gtest.h>

#include "model/named_specs.h"

namespace annulus::testing {
namespace {

using Parity = OnNamedSpecs;
INSTANTIATE_TEST_SUITE_P(Specs, Parity, ::testing::ValuesIn(NamedSpecs()), NameOfSpec);

TEST_P(Parity, LossAndEveryGradientAreThoseOfOneRank) {
  const ModelSpec& spec = GetParam().spec;
  const WholeBatch batch = RandomBatch(spec, GetParam().batch);
  const Outcome one = Train(spec, batch, {.layout = LayoutKind::kContiguous});
  for (const LayoutKind layout : GetParam().layouts()) {
    for (int dp = 1; dp <= 2; ++dp) {
      for (int cp = 1; cp <= 4; ++cp) {
        SCOPED_TRACE(::testing::Message() << NameOf(layout) << " dp " << dp << " cp " << cp);
        ExpectSame(Train(spec, batch, {.layout = layout, .dp = dp, .cp = cp}), one, 1e-12);
      }
    }
  }
}

// Tensor-parallel groups of every size that the model can be split over, alone and under the other axes.
TEST_P(Parity, TensorParallelRanksAreOneRank) {
  const ModelSpec& spec = GetParam().spec;
  const WholeBatch batch = RandomBatch(spec, GetParam().batch);
  const Outcome one = Train(spec, batch, {.layout = LayoutKind::kContiguous});
  int sizes = 0;
  for (const int tp : {2, 3, 4}) {
    if (!ValidateShards(spec, tp).ok()) continue;
    ++sizes;
    for (const auto& [dp, cp] : {std::pair(1, 1), {1, 2}, {1, 3}, {2, 1}, {2, 2}}) {
      for (const LayoutKind layout : {LayoutKind::kContiguous, LayoutKind::kZigzag}) {
        SCOPED_TRACE(::testing::Message() << NameOf(layout) << " dp " << dp << " cp " << cp << " tp " << tp);
        ExpectSame(Train(spec, batch, {.layout = layout, .dp = dp, .cp = cp, .tp = tp}), one, 1e-12);
      }
    }
  }
  EXPECT_GE(sizes, 1) << "a model of this list is split over 2, 3 or 4 ranks";
}

// Recomputing repeats the same operations on the same operands, so not a bit may change; and attention, with
// its exchange, is repeated by kBlock alone.
TEST_P(Parity, RecomputePoliciesAgreeBitForBit) {
  const ModelSpec& spec = GetParam().spec;
  const WholeBatch batch = RandomBatch(spec, GetParam().batch);
  const int split = ValidateShards(spec, 2).ok() ? 2 : 3;
  for (const auto& [cp, tp] : {std::pair(1, 1), {3, 1}, {2, split}}) {
    SCOPED_TRACE(::testing::Message() << "cp " << cp << " tp " << tp);
    const auto outcome = [&, cp = cp, tp = tp](Recompute recompute) {
      return Train(spec, batch, {.cp = cp, .tp = tp, .recompute = recompute});
    };
    const Outcome kept = outcome(Recompute::kNone), output = outcome(Recompute::kAttentionOutput);
    const Outcome products = outcome(Recompute::kElementwise), block = outcome(Recompute::kBlock);
    for (const Outcome* other : {&products, &output, &block}) {
      EXPECT_EQ(other->loss, kept.loss);
      EXPECT_EQ(other->gradients, kept.gradients);
    }
    int64_t forward_bytes = 0;
    OnMesh(spec, batch, {.cp = cp, .tp = tp}, [&](RankModel& model) {
      model.Loss();
      Communicator world = model.mesh().world;
      const double bytes =
          world.AllReduceValue(static_cast<double>(model.bytes_sent()), ReduceOp::kSum).value();
      if (world.rank() == 0) forward_bytes = static_cast<int64_t>(bytes);
    });
    EXPECT_EQ(forward_bytes > 0, cp > 1);
    EXPECT_EQ(output.bytes_sent, kept.bytes_sent);
    // States and halos are kept by every policy.
    if (!GetParam().passes_states()) {
      EXPECT_EQ(block.bytes_sent, kept.bytes_sent + forward_bytes);
    } else if (!GetParam().attends()) {
      EXPECT_EQ(block.bytes_sent, kept.bytes_sent);
    }
  }
}

// In f32 every split is another order of the same sums, so its error against f64 is another sample of the
// same rounding noise. The norm over some 10,000 entries averages most of it out: over a dozen seeds ratios
// lie between 0.75 and 1.22, without a trend, hence 1.5. A carry in a shorter type would multiply the error
// by more than 100, and an error that grows with each of the 8 hops would show as a factor of about 3. The
// loss is one number, found within a quarter of an epsilon: 2 epsilon.
TEST(Precision, ErrorDoesNotGrowWithTheRanks) {
  const ModelSpec spec = SmallSpec({Attention(0), Mlp(), Attention(48), Mlp()});
  const WholeBatch batch = RandomBatch(spec, {.length = 160, .batch = 2});
  const Outcome exact = Train(spec, batch, {});
  const auto error_at = [&](LayoutKind layout, int cp, int tp) {
    const Outcome outcome = Train(spec, batch, {.dtype = DType::kF32, .layout = layout, .cp = cp, .tp = tp});
    EXPECT_LE(std::abs(outcome.loss - exact.loss), 2 * std::numeric_limits<float>::epsilon() * exact.loss);
    return GradientError(outcome, exact);
  };
  const double one = error_at(LayoutKind::kContiguous, 1, 1);
  EXPECT_GT(one, 1e-9) << "f32 is not what ran";
  EXPECT_LT(one, 1e-5);
  for (const LayoutKind layout : kLayouts) {
    for (const auto& [cp, tp] : {std::pair(2, 1), {4, 1}, {8, 1}, {1, 2}, {1, 4}, {2, 2}})
      EXPECT_LE(error_at(layout, cp, tp), 1.5 * one) << NameOf(layout) << " cp " << cp << " tp " << tp;
  }
}

}  // namespace
}  // namespace annulus::testing
