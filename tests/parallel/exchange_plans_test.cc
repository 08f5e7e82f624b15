// Attention by every exchange plan: forward and backward over 1 to 8 loopback ranks equal one rank in f64,
// and in f32 are as exact.

#include <array>

#include "parallel/exchange_plan_cases.h"

namespace annulus::testing {
namespace {

void ExpectOneRank(const LayerCase& c, const PlanChoice& forward, const PlanChoice& backward) {
  SCOPED_TRACE(::testing::Message() << NameOf(c.layout.kind()) << " over " << c.layout.ranks() << ", length "
                                    << c.layout.length() << ", heads " << c.shape.heads << ":"
                                    << c.shape.kv_heads << ", window " << c.shape.window);
  SCOPED_TRACE(::testing::Message() << NameOf(forward, c.layout.ranks()) << "; "
                                    << NameOf(backward, c.layout.ranks()));
  const WholeLayer<double> got =
      RunLayer(c, MakeInputs<double>(c), {.forward = {forward}, .backward = {backward}});
  ExpectSameLayer(got, OneRank(c));
  ExpectEmptyPadding(c, got);
}

class ExchangePlans : public ::testing::TestWithParam<std::tuple<size_t, LayoutKind, int>> {};

INSTANTIATE_TEST_SUITE_P(MasksLayoutsAndRanks, ExchangePlans,
                         ::testing::Combine(::testing::Range<size_t>(0, std::size(kMasks)),
                                            ::testing::ValuesIn(kLayouts), ::testing::Range(1, 9)),
                         [](const auto& info) {
                           return std::string(kMasks[std::get<0>(info.param)].name) + "_" +
                                  NameOf(std::get<1>(info.param)) + "_" +
                                  std::to_string(std::get<2>(info.param));
                         });

TEST_P(ExchangePlans, EqualOneRank) {
  const auto [mask, kind, ranks] = GetParam();
  uint64_t draw = 1000 * mask + 100 * static_cast<uint64_t>(kind) + 10 * static_cast<uint64_t>(ranks);
  // Of 8 heads: splits that some case's heads do not fill leave ranks without heads.
  for (const PlanChoice& choice : AllChoices(ranks, 8)) {
    ExpectOneRank(MakeCase(kMasks[mask], kind, ranks, ++draw), choice, choice);
  }
}

// What AllChoices leaves at its default.
TEST(ExchangePlanOptions, EqualOneRank) {
  uint64_t draw = 0;
  for (const int ranks : {3, 4, 6}) {
    for (const PlanChoice& plain : AllChoices(ranks, 8)) {
      PlanChoice choice = plain;
      choice.parts = 1 + static_cast<int>(++draw % 3);
      choice.buffers = 2 + static_cast<int>(draw % 2);
      choice.direction = draw % 2 ? RingDirection::kTowardHigher : RingDirection::kTowardLower;
      choice.output_width = draw % 3 ? Width::kCompute : Width::kAccumulator;
      const MaskCase& mask = kMasks[draw % std::size(kMasks)];
      ExpectOneRank(MakeCase(mask, kLayouts[draw % std::size(kLayouts)], ranks, draw), choice, choice);
    }
  }
}

// Forward and backward are chosen apart.
TEST(ExchangePlanOptions, PassesMayDiffer) {
  const std::vector<PlanChoice> choices = AllChoices(4, 5);
  for (size_t i = 0; i < choices.size(); ++i) {
    ExpectOneRank(MakeCase(kMasks[0], LayoutKind::kZigzag, 4, i), choices[i],
                  choices[(i + 5) % choices.size()]);
  }
}

// ---- Errors in f32 ------------------------------------------------------------------------------

// Root mean squares of the differences to f64, relative to those of the values.
enum { kOut, kLse, kQueryGrad, kKvGrad, kTensors };
using Errors = std::array<double, kTensors>;

class ErrorSums {
 public:
  void Add(const WholeLayer<float>& got, const WholeLayer<double>& exact) {
    AddTensor(kOut, got.out, exact.out);
    AddTensor(kLse, got.lse, exact.lse);
    AddTensor(kQueryGrad, got.dq, exact.dq);
    AddTensor(kKvGrad, got.dkv, exact.dkv);
  }
  Errors Relative() const {
    Errors errors;
    for (size_t i = 0; i < errors.size(); ++i) errors[i] = std::sqrt(differences_[i] / values_[i]);
    return errors;
  }

 private:
  void AddTensor(size_t i, const std::vector<float>& got, const std::vector<double>& exact) {
    ASSERT_EQ(got.size(), exact.size());
    for (size_t k = 0; k < got.size(); ++k) {
      const double difference = static_cast<double>(got[k]) - exact[k];
      differences_[i] += difference * difference;
      values_[i] += exact[k] * exact[k];
    }
  }

  Errors differences_ = {}, values_ = {};
};

// Over seeds, the root mean square error of P ranks is at most 1.1 times that of one rank, for the output and
// every gradient. The LSE is exact but for roundings to f32: one on one rank, where a call keeps its sum, and
// one for each call that carries it on, which are at most two a block. They add up like independent errors.
TEST(ExchangePlanErrors, DoNotGrowWithTheRanks) {
  constexpr int64_t kLength = 1680;  // 2 * 840: no padding on any number of ranks, zigzag
  constexpr std::array<uint64_t, 2> kSeeds = {1, 2};
  const auto case_of = [&](int ranks) -> LayerCase {
    return {SequenceLayout(LayoutKind::kZigzag, kLength, ranks),
            {.batch = 1, .lengths = {kLength}, .document_starts = {}},
            {.heads = 2, .kv_heads = 1, .head_dim = 32, .v_head_dim = 32, .window = 0, .scale = 0.2}};
  };
  std::vector<WholeLayer<double>> exact;
  ErrorSums one_rank;
  for (const uint64_t seed : kSeeds) {
    exact.push_back(RunLayer(case_of(1), MakeInputs<double>(case_of(1), seed)));
    one_rank.Add(RunLayer(case_of(1), MakeInputs<float>(case_of(1), seed)), exact.back());
  }
  const Errors base = one_rank.Relative();
  for (int ranks = 2; ranks <= 8; ++ranks) {
    Errors most = base;
    for (double& error : most) error *= 1.1;
    most[kLse] *= std::sqrt(2.0 * ranks);
    for (const PlanChoice& choice : AllChoices(ranks, 2)) {
      ErrorSums sums;
      for (size_t s = 0; s < kSeeds.size(); ++s) {
        const LayerCase c = case_of(ranks);
        sums.Add(RunLayer(c, MakeInputs<float>(c, kSeeds[s]), {.forward = {choice}, .backward = {choice}}),
                 exact[s]);
      }
      const Errors errors = sums.Relative();
      for (size_t i = 0; i < kTensors; ++i) {
        EXPECT_LE(errors[i], most[i]) << "tensor " << i << ", " << NameOf(choice, ranks) << " on " << ranks;
      }
    }
  }
}

}  // namespace
}  // namespace annulus::testing
