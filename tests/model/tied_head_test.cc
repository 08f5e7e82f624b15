#include <gtest/gtest.h>

#include "model/mesh_run.h"

namespace annulus::testing {
namespace {

// With equal weights a tied model is the untied one, and its gradient the sum of the two.
void ExpectSumOfBothUses(int cp, int tp) {
  ModelSpec spec = SmallSpec({Attention(0), Mlp()});
  const WholeBatch batch = RandomBatch(spec, {.length = 17, .batch = 2});
  const Outcome untied =
      Train(spec, batch, {.cp = cp, .tp = tp, .fill = [](ParamStore& params) {
                            FillRandom(params);
                            const TensorRef embed = params.Value(params.table().IndexOf("embed.weight"));
                            std::copy_n(embed.data<double>(), embed.elements(),
                                        params.Value(params.table().IndexOf("head.weight")).data<double>());
                          }});
  spec.tied_head = true;
  const Outcome tied = Train(spec, batch, {.cp = cp, .tp = tp});
  EXPECT_NEAR(tied.loss, untied.loss, 1e-12);
  ASSERT_EQ(tied.gradients.size() + 1, untied.gradients.size());
  std::vector<double> sum = untied.gradients.at("embed.weight");
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += untied.gradients.at("head.weight")[i];
  for (const auto& [name, gradient] : tied.gradients) {
    const std::vector<double>& want = name == "embed.weight" ? sum : untied.gradients.at(name);
    EXPECT_LE(RelativeDifference(gradient, want), 1e-12) << name;
  }
}
TEST(TiedHead, SumsTheGradientsOfBothUses) { ExpectSumOfBothUses(2, 1); }
TEST(TiedHead, SumsThemOverPartsOfTheVocabulary) { ExpectSumOfBothUses(1, 4); }

}  // namespace
}  // namespace annulus::testing
