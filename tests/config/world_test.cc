// Whether a run fits a number of ranks.

#include "sample_config.h"

namespace annulus {
namespace {

const std::string kWithCp2 = Changed("optim {", "parallel { cp: 2 } optim {");

TEST(World, TakesEveryFittingNumberOfRanks) {
  for (const int64_t world : {1, 2, 4, 8}) {
    EXPECT_EQ(ErrorsOf(kSampleConfig, {}, world), "ok");
    EXPECT_EQ(ErrorsOf(kWithCp2, {}, 2 * world), "ok");
    EXPECT_TRUE(ValidateForWorld(Load(kSampleConfig)->spec, world).ok());
  }
  // Any sequence length goes on any number of ranks, by padding.
  EXPECT_EQ(ErrorsOf(kSampleConfig, {"data.seq_len=1", "parallel.cp=3"}, 3), "ok");
}

TEST(World, NamesTheFieldThatDoesNotFit) {
  EXPECT_EQ(ErrorsOf(kWithCp2, {}, 3),
            "c.textproto:12:12: parallel.cp=2: expected cp * tp = 2 to divide the 3 ranks "
            "(nearest valid value 1 or 3)");
  EXPECT_EQ(ErrorsOf(kWithCp2, {"parallel.cp=5"}, 4),
            "--set parallel.cp=5: expected cp * tp = 5 to divide the 4 ranks (nearest valid value 4)");
  EXPECT_EQ(ErrorsOf(kWithCp2, {"parallel.tp=2"}, 6),
            "c.textproto:12:12: parallel.cp=2: expected cp * tp = 4 to divide the 6 ranks (nearest valid "
            "value 1 or 3)");
  EXPECT_EQ(ErrorsOf(kWithCp2, {"parallel.tp=2"}, 3),
            "--set parallel.tp=2: expected cp * tp = 4 to divide the 3 ranks (nearest valid value 1 or 3)");
  EXPECT_EQ(
      ErrorsOf(kWithCp2, {"parallel.dp=2"}, 8),
      "--set parallel.dp=2: expected dp * cp * tp = 2 * 2 * 1 = 4 to be the 8 ranks (nearest valid value 4)");
  EXPECT_EQ(
      ErrorsOf(kSampleConfig, {}, 3),
      "c.textproto:15:3: optim.sequences_per_step=8: expected a multiple of dp * micro_batch = 3 * 1 = 3 "
      "(nearest valid value 6 or 9)");
  EXPECT_EQ(
      ErrorsOf(kSampleConfig, {"parallel.dp=3"}),
      "c.textproto:15:3: optim.sequences_per_step=8: expected a multiple of dp * micro_batch = 3 * 1 = 3 "
      "(nearest valid value 6 or 9)");
  EXPECT_EQ(ErrorsOf(kSampleConfig, {}, 0), "c.textproto:1:1: world=0: expected 1 to 1048576 ranks");
}

TEST(World, ValidatesPlainSpecs) {
  RunSpec spec = Load(kWithCp2)->spec;
  EXPECT_EQ(ValidateForWorld(spec, 3).message(),
            "parallel.cp=2: expected cp * tp = 2 to divide the 3 ranks (nearest valid value 1 or 3)");
  EXPECT_EQ(ValidateForWorld(spec, int64_t{1} << 62).message(),
            "world=4611686018427387904: expected 1 to 1048576 ranks");
  spec.parallel.tp = 3;
  EXPECT_EQ(ValidateForWorld(spec, 6).message(),
            "parallel.tp=3: expected a divisor of model.attention.heads=4 (nearest valid value 2 or 4)\n"
            "parallel.tp=3: expected a divisor or a multiple of model.attention.kv_heads=2 "
            "(nearest valid value 2 or 4)\n"
            "parallel.tp=3: expected a divisor of model.mlp.d_ff=128 (nearest valid value 2 or 4)");
  spec.model.head_dim = 3;
  EXPECT_EQ(ValidateForWorld(spec, 6).message(),
            "model.attention.head_dim=3: expected an even number of at least 2 (nearest valid value 2 or 4)");
}

}  // namespace
}  // namespace annulus
