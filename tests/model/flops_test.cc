// FLOPs against closed forms and hand counts.

#include <gtest/gtest.h>

#include "annulus/model/cost.h"
#include "model/every_kind.h"
#include "parallel/sequences.h"

namespace annulus::testing {
namespace {

// Forward FLOPs of a token in one layer, without the head, of a causal mask.
double ForwardOf(ModelSpec spec, const LayerSpec& layer, int64_t length) {
  spec.layers = {layer};
  const double head = 2.0 * static_cast<double>(spec.d_model * spec.vocab_size);
  return TrainingFlops(spec, length).causal / 3 - head;
}

TEST(Flops, EqualAHandCount) {
  const ModelSpec spec{
      .d_model = 8,
      .vocab_size = 10,
      .heads = 2,
      .kv_heads = 1,
      .head_dim = 4,
      .d_ff = 12,
      .tied_head = false,
      .layers = {Layer(BranchKind::kAttention), Layer(BranchKind::kMlp), Layer(BranchSpec{.window = 3})}};
  // Attention 8*8 + 2*4*8 + 8*8 = 192 each, MLP 3*12*8 = 288, head 80; 12*2*4 = 96 a visible key.
  const double matmul = 6 * (2 * 192 + 288 + 80);
  const FlopsPerToken flops = TrainingFlops(spec, 6);
  EXPECT_DOUBLE_EQ(flops.causal, matmul + 96 * (3.5 + 2.5));  // (1+..+6)/6 and (1+2+3+3+3+3)/6 keys
  EXPECT_DOUBLE_EQ(flops.full, matmul + 96 * (6 + 3));
  ModelSpec tied = spec;
  tied.tied_head = true;
  EXPECT_DOUBLE_EQ(TrainingFlops(tied, 6).causal, flops.causal);
}

TEST(Flops, MeanVisibleKeysCountTheMask) {
  for (int64_t length = 1; length <= 20; ++length) {
    for (int64_t window = 0; window <= 25; ++window) {
      const SequenceBatch sequences{.batch = 1, .lengths = {length}, .document_starts = {}};
      double keys = 0;
      for (int64_t q = 0; q < length; ++q) {
        for (int64_t k = 0; k < length; ++k) keys += Sees(sequences, window, 0, q, k);
      }
      EXPECT_DOUBLE_EQ(MeanVisibleKeys(length, window), keys / static_cast<double>(length))
          << length << " " << window;
    }
  }
}

// DeepSeek-V3's layer: 187 M parameters in products; scores and values of 128 heads.
TEST(Flops, OfLatentAttention) {
  ModelSpec spec{.d_model = 7168, .vocab_size = 100};
  spec.latent = {.heads = 128, .q_rank = 1536, .kv_rank = 512, .nope_dim = 128, .rope_dim = 64, .v_dim = 128};
  const double d = 7168, rq = 1536, r = 512, h = 128, keys = (4096 + 1) / 2.0;
  const double products =
      2 * (d * rq + rq * h * (128 + 64) + d * (r + 64) + r * h * (128 + 128) + h * 128 * d);
  const LayerSpec mla = Layer(BranchKind::kLatentAttention);
  EXPECT_DOUBLE_EQ(ForwardOf(spec, mla, 4096), products + 81920 * keys);
  // Of g branches each has attention of its own; the parameters are as many.
  const LayerSpec tpla = Layer({.kind = BranchKind::kLatentAttention, .latent_groups = 4});
  EXPECT_DOUBLE_EQ(ForwardOf(spec, tpla, 4096), products + 4 * 81920 * keys);
}

TEST(Flops, OfMamba) {
  ModelSpec spec{.d_model = 4096, .vocab_size = 100};
  spec.mamba = {.heads = 128, .head_dim = 64, .state = 128, .groups = 8, .conv = 4, .chunk = 256};
  const double d = 4096, inner = 8192, bc = 8 * 128;
  const double products = 2 * d * (2 * inner + 2 * bc + 128) + 2 * inner * d + 2 * 4 * (inner + 2 * bc);
  const double scan = 4 * inner * 128 + 256 * (bc + inner);
  for (const int64_t length : {1024, 4096}) {  // does not grow with the length
    EXPECT_DOUBLE_EQ(ForwardOf(spec, Layer(BranchKind::kMamba), length), products + scan);
  }
}

TEST(Flops, OfLinearAttention) {
  ModelSpec spec{.d_model = 512, .vocab_size = 100};
  spec.lightning = {.heads = 8, .key_dim = 64, .value_dim = 64, .chunk = 128};
  const double d = 512, h = 8, dim = 64;
  EXPECT_DOUBLE_EQ(ForwardOf(spec, Layer(BranchKind::kLightning), 100),
                   10 * d * h * dim + 4 * h * dim * dim + 2 * 128 * h * dim);
  spec.based = {.heads = 16, .key_dim = 16, .value_dim = 32, .chunk = 64};
  const double features = 1 + 16 + 256;
  EXPECT_DOUBLE_EQ(ForwardOf(spec, Layer(BranchKind::kBased), 100),
                   2 * d * 16 * (2 * 16 + 2 * 32) + 16 * (4 * features * 33 + 64 * (features + 33)));
  spec.delta = {.heads = 4, .key_dim = 96, .value_dim = 128, .conv = 4};
  EXPECT_DOUBLE_EQ(ForwardOf(spec, Layer(BranchKind::kDeltaNet), 100),
                   2 * d * 4 * (2 * 96 + 3 * 128 + 2) + 2 * 4 * 4 * (2 * 96 + 128) + 6 * 4 * 96 * 128);
}

TEST(Flops, OfTheMlp) {
  ModelSpec spec{.d_model = 64, .vocab_size = 100, .d_ff = 200};
  EXPECT_DOUBLE_EQ(ForwardOf(spec, Layer(BranchKind::kMlp), 10), 6 * 64 * 200);
  spec.activation = Activation::kReluSquared;
  EXPECT_DOUBLE_EQ(ForwardOf(spec, Layer(BranchKind::kMlp), 10), 4 * 64 * 200);
}

TEST(Flops, LayersAddUpWhateverTheyShare) {
  const auto causal = [](std::vector<LayerSpec> layers) {
    ModelSpec spec = EveryKind(std::move(layers));
    return TrainingFlops(spec, 64).causal;
  };
  const double head = 6 * 16 * 29;
  const double mlp = causal({Layer(BranchKind::kMlp)}) - head;
  const double mamba = causal({Layer(BranchKind::kMamba)}) - head;
  EXPECT_DOUBLE_EQ(causal({{.branches = {{.kind = BranchKind::kMlp}, {.kind = BranchKind::kMamba}}}}),
                   head + mlp + mamba);
  // Tied layers compute as often as they stand.
  const LayerSpec tied = Layer({.kind = BranchKind::kMamba, .tie = "t"});
  EXPECT_DOUBLE_EQ(causal({tied, tied, tied}), head + 3 * mamba);
  // Keys and values of another layer are not projected again: k and v are 24 x 16 each.
  const double attention = causal({Layer(BranchKind::kAttention)}) - head;
  EXPECT_DOUBLE_EQ(causal({Layer(BranchKind::kAttention), Layer(BranchSpec{.kv_layers_back = 1})}),
                   head + 2 * attention - 6 * 2 * 24 * 16);
}

// Two meta tokens before eight: ten pass through the layers for eight that count.
TEST(Flops, MetaTokensPassThroughTheLayers) {
  ModelSpec spec = EveryKind({Layer(BranchKind::kMlp)});
  const double head = 6 * 16 * 29, mlp = TrainingFlops(spec, 8).causal - head;
  spec.meta_tokens = 2;
  EXPECT_DOUBLE_EQ(TrainingFlops(spec, 8).causal, head + mlp * 10 / 8);
}

}  // namespace
}  // namespace annulus::testing
