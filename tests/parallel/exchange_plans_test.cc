// Attention by every exchange plan: forward and backward over 1 to 8 loopback ranks equal one rank in f64.

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

}  // namespace
}  // namespace annulus::testing
