// Which specs are models, and over how many ranks they can be split.

#include "annulus/model/spec.h"

#include <gtest/gtest.h>

#include <limits>

namespace annulus {
namespace {

LayerSpec Layer(BranchSpec branch) { return {.branches = {std::move(branch)}}; }
LayerSpec Layer(BranchKind kind) { return Layer(BranchSpec{.kind = kind}); }

// One layer of each kind.
ModelSpec Every() {
  return {
      .d_model = 16,
      .vocab_size = 32,
      .heads = 4,
      .kv_heads = 2,
      .head_dim = 4,
      .d_ff = 24,
      .layers = {Layer({.rope_theta = 10000.0}), Layer(BranchKind::kMlp),
                 Layer({.kind = BranchKind::kLatentAttention, .latent_groups = 2}), Layer(BranchKind::kMamba),
                 Layer(BranchKind::kLightning), Layer(BranchKind::kBased), Layer(BranchKind::kDeltaNet)},
      .latent = {.heads = 4, .q_rank = 8, .kv_rank = 6, .nope_dim = 3, .rope_dim = 2, .v_dim = 5},
      .mamba = {.heads = 8, .head_dim = 4, .state = 3, .groups = 2},
      .lightning = {.heads = 4, .key_dim = 3, .value_dim = 3},
      .based = {.heads = 2, .key_dim = 4, .value_dim = 6},
      .delta = {.heads = 4, .key_dim = 3, .value_dim = 5}};
}

std::string Finding(const ModelSpec& spec) { return std::string(Validate(spec).message()); }

TEST(ValidateModel, TakesAWholeSpec) { EXPECT_TRUE(Validate(Every()).ok()) << Validate(Every()); }

TEST(ValidateModel, WhatNoLayerUsesIsNotAskedFor) {
  const ModelSpec mlp{
      .d_model = 4, .vocab_size = 8, .d_ff = 8, .layers = {Layer(BranchKind::kMlp), Layer(BranchKind::kMlp)}};
  EXPECT_TRUE(Validate(mlp).ok()) << Validate(mlp);
  ModelSpec attention = mlp;
  attention.layers = {Layer({.rope_theta = 1e4})};
  attention.heads = 2, attention.kv_heads = 1, attention.head_dim = 2, attention.d_ff = 0;
  EXPECT_TRUE(Validate(attention).ok()) << Validate(attention);
}

// Each kind with a section that was left away.
TEST(ValidateModel, WhatALayerUsesIsAskedFor) {
  const auto finding = [](BranchKind kind) {
    return Finding({.d_model = 4, .vocab_size = 8, .layers = {Layer(kind)}});
  };
  EXPECT_EQ(finding(BranchKind::kMlp), "model.mlp.d_ff=0: expected at least 1 (nearest valid value 1)");
  EXPECT_EQ(finding(BranchKind::kBased),
            "model.based.heads=0: expected at least 1 (nearest valid value 1)\n"
            "model.based.key_dim=0: expected at least 1 (nearest valid value 1)\n"
            "model.based.value_dim=0: expected at least 1 (nearest valid value 1)");
  for (const BranchKind kind : {BranchKind::kAttention, BranchKind::kLatentAttention, BranchKind::kMamba,
                                BranchKind::kLightning, BranchKind::kDeltaNet}) {
    const std::string heads = std::string("model.") + Name(kind) + ".heads=0: expected at least 1";
    EXPECT_EQ(finding(kind).substr(0, heads.size()), heads);
  }
}

TEST(ValidateModel, NamesEveryFieldThatDoesNotFit) {
  const auto finding = [](auto change) {
    ModelSpec spec = Every();
    change(spec);
    return Finding(spec);
  };
  EXPECT_EQ(finding([](ModelSpec& s) { s.heads = 6, s.kv_heads = 4; }),
            "model.attention.heads=6: expected a multiple of model.attention.kv_heads=4 "
            "(nearest valid value 4 or 8)");
  EXPECT_EQ(finding([](ModelSpec& s) { s.heads = 3, s.kv_heads = 4; }),
            "model.attention.heads=3: expected a multiple of model.attention.kv_heads=4 "
            "(nearest valid value 4)");
  EXPECT_EQ(finding([](ModelSpec& s) { s.head_dim = 5; }),
            "model.attention.head_dim=5: expected an even number of at least 2 "
            "(nearest valid value 4 or 6)");
  EXPECT_EQ(finding([](ModelSpec& s) { s.d_model = 0, s.d_ff = -1; }),
            "model.d_model=0: expected at least 1 (nearest valid value 1)\n"
            "model.mlp.d_ff=-1: expected at least 1 (nearest valid value 1)");
  EXPECT_EQ(finding([](ModelSpec& s) { s.norm_eps = std::numeric_limits<double>::quiet_NaN(); }),
            "model.norm_eps=nan: expected a finite number above 0");
  EXPECT_EQ(finding([](ModelSpec& s) { s.layers.clear(); }), "model.layers=[]: expected at least one layer");
  EXPECT_EQ(finding([](ModelSpec& s) { s.latent.kv_rank = 7; }),
            "model.latent.kv_rank=7: expected a multiple of g=2 (nearest valid value 6 or 8)");
  EXPECT_EQ(finding([](ModelSpec& s) { s.latent.rope_dim = 0, s.latent.q_rank = -1; }),
            "model.latent.q_rank=-1: expected at least 0 (nearest valid value 0)\n"
            "model.latent.rope_dim=0: expected an even number of at least 2 (nearest valid value 2)");
  EXPECT_EQ(finding([](ModelSpec& s) { s.mamba.groups = 3; }),
            "model.mamba.groups=3: expected a divisor of model.mamba.heads=8 (nearest valid value 2 or 4)");
  EXPECT_EQ(finding([](ModelSpec& s) { s.mamba.conv = 9, s.mamba.dt_min = 0.1, s.mamba.dt_max = 0.1; }),
            "model.mamba.conv=9: expected 1 to 8 taps (nearest valid value 8)\n"
            "model.mamba.dt_max=0.1: expected 0 (no limit) or a finite number above model.mamba.dt_min=0.1");
  EXPECT_EQ(finding([](ModelSpec& s) { s.delta.conv = 9; }),
            "model.delta.conv=9: expected 0 (none) to 8 taps (nearest valid value 8)");
  EXPECT_EQ(finding([](ModelSpec& s) { s.rope_scaling = {.kind = RopeScalingKind::kYarn, .factor = 0.5}; }),
            "model.rope_scaling.yarn.factor=0.5: expected a finite number of at least 1\n"
            "model.rope_scaling.yarn.original_length=0: expected at least 1 token");
  EXPECT_EQ(finding([](ModelSpec& s) {
              s.rope_scaling = {.kind = RopeScalingKind::kLlama3,
                                .factor = 8,
                                .original_length = 8192,
                                .low_freq_factor = 4,
                                .high_freq_factor = 4};
            }),
            "model.rope_scaling.llama3.high_freq_factor=4: expected a finite number above low_freq_factor=4");
}

TEST(ValidateModel, NamesTheLayerThatDoesNotFit) {
  const auto finding = [](size_t layer, auto change) {
    ModelSpec spec = Every();
    change(spec.layers[layer]);
    return Finding(spec);
  };
  EXPECT_EQ(finding(0, [](LayerSpec& l) { l.branches[0].window = -1; }),
            "model.layers[0].branches[0].window=-1: expected at least 0, where 0 is all, and 0 on all but A "
            "and T");
  EXPECT_EQ(finding(3, [](LayerSpec& l) { l.branches[0].window = 4; }),
            "model.layers[3].branches[0].window=4: expected at least 0, where 0 is all, and 0 on all but A "
            "and T");
  EXPECT_EQ(finding(1, [](LayerSpec& l) { l.branches[0].rope_theta = 1e4; }),
            "model.layers[1].branches[0].rope_theta=10000: expected a finite number of at least 1, and none "
            "on all but A and T");
  EXPECT_EQ(finding(3, [](LayerSpec& l) { l.branches[0].latent_groups = 2; }),
            "model.layers[3].branches[0].latent_groups=2: expected at least 1, and 1 on all but T");
  EXPECT_EQ(finding(3, [](LayerSpec& l) { l.branches.clear(); }),
            "model.layers[3].branches=[]: expected at least one branch");
  EXPECT_EQ(finding(3, [](LayerSpec& l) { l.branches.push_back(l.branches[0]); }),
            "model.layers[3].branches[1].kind=mamba: expected each kind once in a layer");
  EXPECT_EQ(finding(3, [](LayerSpec& l) { l.combine = Combine::kMeanNorm; }),
            "model.layers[3].combine=mean-norm: expected sum with a single branch");
  EXPECT_EQ(finding(0, [](LayerSpec& l) { l.branches[0].kv_layers_back = 1; }),
            "model.layers[0]=unfit: expected layers that fit together: kv=@-1: expected an earlier layer "
            "with A; 0 layers stand before layer 0");
  EXPECT_EQ(finding(3, [](LayerSpec& l) { l.branches[0].kind = static_cast<BranchKind>('E'); }),
            "model.layers[3].branches[0].kind=E: expected one of A, T, M, L, B, G and -");
}

std::string ShardFinding(const ModelSpec& spec, int64_t tp) {
  return std::string(ValidateShards(spec, tp).message());
}

TEST(ValidateShards, HeadsAreNotCut) {
  EXPECT_TRUE(ValidateShards(Every(), 1).ok());
  EXPECT_TRUE(ValidateShards(Every(), 2).ok());
  EXPECT_EQ(ShardFinding(Every(), 4),
            "parallel.tp=4: expected a divisor of model.based.heads=2 (nearest valid value 2)");
  EXPECT_EQ(
      ShardFinding(Every(), 3),
      "parallel.tp=3: expected a divisor of model.attention.heads=4 (nearest valid value 2)\n"
      "parallel.tp=3: expected a divisor or a multiple of model.attention.kv_heads=2 "
      "(nearest valid value 2)\n"
      "parallel.tp=3: expected a divisor of model.latent.heads=4 (nearest valid value 2)\n"
      "parallel.tp=3: expected a divisor of model.mamba.heads=8 (nearest valid value 2)\n"
      "parallel.tp=3: expected a divisor or a multiple of model.mamba.groups=2 (nearest valid value 2)\n"
      "parallel.tp=3: expected a divisor of model.lightning.heads=4 (nearest valid value 2)\n"
      "parallel.tp=3: expected a divisor of model.based.heads=2 (nearest valid value 2)\n"
      "parallel.tp=3: expected a divisor of model.delta.heads=4 (nearest valid value 2)");
  EXPECT_EQ(ShardFinding(Every(), 0), "parallel.tp=0: expected at least 1 (nearest valid value 1)");
}

TEST(ValidateShards, FewerKeysAndValuesOrGroupsThanRanksAreOnEach) {
  ModelSpec spec = Every();
  spec.layers = {Layer({.rope_theta = 1e4}), Layer(BranchKind::kMlp), Layer(BranchKind::kMamba)};
  EXPECT_TRUE(ValidateShards(spec, 4).ok()) << ValidateShards(spec, 4);
  spec.heads = 12, spec.kv_heads = 4;
  EXPECT_EQ(ShardFinding(spec, 3),
            "parallel.tp=3: expected a divisor or a multiple of model.attention.kv_heads=4 "
            "(nearest valid value 2 or 4)\n"
            "parallel.tp=3: expected a divisor of model.mamba.heads=8 (nearest valid value 2 or 4)\n"
            "parallel.tp=3: expected a divisor or a multiple of model.mamba.groups=2 "
            "(nearest valid value 2 or 4)");
}

TEST(ValidateShards, EveryRankHasRowsOfTheVocabulary) {
  const ModelSpec spec{.d_model = 4, .vocab_size = 9, .d_ff = 64, .layers = {Layer(BranchKind::kMlp)}};
  EXPECT_TRUE(ValidateShards(spec, 8).ok());
  EXPECT_EQ(ShardFinding(spec, 16),
            "parallel.tp=16: expected at most model.vocab_size=9 (nearest valid value 8)");
}

}  // namespace
}  // namespace annulus
