// The same numbers on any mesh, layout and recompute policy.

#include <gtest/gtest.h>

#include "model/mesh_run.h"

namespace annulus::testing {
namespace {

struct MaskCase {
  const char* name;
  std::vector<LayerSpec> layers;
  BatchShape batch;
};

// 37 and 41 are divided by no number of ranks.
std::vector<MaskCase> MaskCases() {
  return {{"causal", {Attention(0), Mlp(), Attention(0), Mlp()}, {.length = 24, .batch = 2}},
          {"causal_padded", {Attention(0), Mlp(), Attention(0), Mlp()}, {.length = 37, .batch = 2}},
          {"window", {Attention(7), Mlp(), Attention(7), Mlp()}, {.length = 37, .batch = 2}},
          {"documents",
           {Attention(0), Mlp(), Attention(0), Mlp()},
           {.length = 37, .batch = 2, .documents = Documents::kRandom}},
          {"mixed",
           {Attention(5), Mlp(), Attention(0, std::nullopt), Mlp()},
           {.length = 41, .batch = 4, .lengths = Lengths::kRandom, .documents = Documents::kRandom}}};
}

class Parity : public ::testing::TestWithParam<MaskCase> {};
INSTANTIATE_TEST_SUITE_P(Masks, Parity, ::testing::ValuesIn(MaskCases()),
                         [](const auto& info) { return info.param.name; });

TEST_P(Parity, LossAndEveryGradientAreThoseOfOneRank) {
  const ModelSpec spec = SmallSpec(GetParam().layers);
  const WholeBatch batch = RandomBatch(spec, GetParam().batch);
  const Outcome one = Train(spec, batch, {.layout = LayoutKind::kContiguous});
  for (const LayoutKind layout : kLayouts) {
    for (int dp = 1; dp <= 2; ++dp) {
      for (int cp = 1; cp <= 4; ++cp) {
        SCOPED_TRACE(::testing::Message() << NameOf(layout) << " dp " << dp << " cp " << cp);
        ExpectSame(Train(spec, batch, {.layout = layout, .dp = dp, .cp = cp}), one, 1e-12);
      }
    }
  }
}

// Recomputing repeats the same operations on the same operands, so not a bit may change; and attention, with
// its exchange, is repeated by kBlock alone.
TEST_P(Parity, RecomputePoliciesAgreeBitForBit) {
  const ModelSpec spec = SmallSpec(GetParam().layers);
  const WholeBatch batch = RandomBatch(spec, GetParam().batch);
  for (const int cp : {1, 3}) {
    const Outcome kept = Train(spec, batch, {.cp = cp, .recompute = Recompute::kNone});
    const Outcome products = Train(spec, batch, {.cp = cp, .recompute = Recompute::kElementwise});
    const Outcome output = Train(spec, batch, {.cp = cp, .recompute = Recompute::kAttentionOutput});
    const Outcome block = Train(spec, batch, {.cp = cp, .recompute = Recompute::kBlock});
    for (const Outcome* other : {&products, &output, &block}) {
      EXPECT_EQ(other->loss, kept.loss);
      EXPECT_EQ(other->gradients, kept.gradients);
    }
    int64_t forward_bytes = 0;
    OnMesh(spec, batch, {.cp = cp}, [&](RankModel& model) {
      model.Loss();
      Communicator group = model.mesh().cp;
      const double bytes =
          group.AllReduceValue(static_cast<double>(model.bytes_sent()), ReduceOp::kSum).value();
      if (group.rank() == 0) forward_bytes = static_cast<int64_t>(bytes);
    });
    EXPECT_EQ(forward_bytes > 0, cp > 1);
    EXPECT_EQ(output.bytes_sent, kept.bytes_sent);
    EXPECT_EQ(block.bytes_sent, kept.bytes_sent + forward_bytes);
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
  const auto error_at = [&](LayoutKind layout, int cp) {
    const Outcome outcome = Train(spec, batch, {.dtype = DType::kF32, .layout = layout, .cp = cp});
    EXPECT_LE(std::abs(outcome.loss - exact.loss), 2 * std::numeric_limits<float>::epsilon() * exact.loss);
    return GradientError(outcome, exact);
  };
  const double one = error_at(LayoutKind::kContiguous, 1);
  EXPECT_GT(one, 1e-9) << "f32 is not what ran";
  EXPECT_LT(one, 1e-5);
  for (const LayoutKind layout : kLayouts) {
    for (const int cp : {2, 4, 8})
      EXPECT_LE(error_at(layout, cp), 1.5 * one) << NameOf(layout) << " cp " << cp;
  }
}

}  // namespace
}  // namespace annulus::testing
