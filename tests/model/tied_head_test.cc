#include <gtest/gtest.h>

#include "model/mesh_run.h"

namespace annulus::testing {
namespace {

// With equal weights a tied model is the untied one, and its gradient the sum of the two.
TEST(TiedHead, SumsTheGradientsOfBothUses) {
  ModelSpec spec = SmallSpec({Attention(0), Mlp()});
  const WholeBatch batch = RandomBatch(spec, {.length = 17, .batch = 2});
  const Outcome untied =
      Train(spec, batch, {.cp = 2, .fill = [](ParamStore& params) {
                            FillRandom(params);
                            const TensorRef embed = params.Value(params.table().IndexOf("embed.weight"));
                            std::copy_n(embed.data<double>(), embed.elements(),
                                        params.Value(params.table().IndexOf("head.weight")).data<double>());
                          }});
  spec.tied_head = true;
  const Outcome tied = Train(spec, batch, {.cp = 2});
  EXPECT_NEAR(tied.loss, untied.loss, 1e-12);
  ASSERT_EQ(tied.names.size() + 1, untied.names.size());
  std::vector<double> sum = untied.gradients.front();
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += untied.gradients.back()[i];
  EXPECT_LE(RelativeDifference(tied.gradients.front(), sum), 1e-12);
  for (size_t i = 1; i < tied.gradients.size(); ++i) {
    EXPECT_LE(RelativeDifference(tied.gradients[i], untied.gradients[i]), 1e-12) << tied.names[i];
  }
}

}  // namespace
}  // namespace annulus::testing
