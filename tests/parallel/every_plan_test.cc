// The judge of every_plan.h: sums over blocks that are in f32 pass, however many blocks, and sums that are
// rounded from block to block do not.

#include "parallel/every_plan.h"

#include <gtest/gtest.h>

namespace annulus::testing {
namespace {

using Layer = JudgedLayer<BFloat16>;
constexpr LayerKind kSmall = {"causal", LayoutKind::kZigzag, 64, 1, 0, Documents::kNone, Lengths::kFull, 32};

// Gradients of keys as from `blocks` blocks, whose shares are drawn, each rounded once; `round_sums`: what
// happens to the sum after each.
std::vector<double> InBlocks(const Layer& layer, int blocks, const std::function<float(float)>& round_sums) {
  const std::vector<double>& whole = layer.exact.dk;
  const RandomStream random(5, "shares of blocks");
  std::vector<double> sums;
  for (size_t i = 0; i < whole.size(); ++i) {
    std::vector<double> shares;
    double mean = 0;
    for (int b = 0; b < blocks; ++b) {
      shares.push_back(random.Normal(i * static_cast<size_t>(blocks) + static_cast<size_t>(b)));
      mean += shares.back() / blocks;
    }
    float sum = 0;
    // Independent shares of a sum are each 1 / sqrt(blocks) of it.
    for (double& share : shares) {
      share = whole[i] / blocks + (share - mean) * std::abs(whole[i]) / std::sqrt(blocks);
      sum = round_sums(sum + Layer::Round(static_cast<float>(share)));
    }
    sums.push_back(ToDouble(FromDouble<BFloat16>(static_cast<double>(sum))));
  }
  return sums;
}

TEST(EveryPlanJudge, RefusesSumsThatAreRoundedFromBlockToBlock) {
  Communicator alone = MakeLoopbackGroup(1)[0];
  const Layer layer(kSmall, 4, BlockGradients::kRounded);
  for (const int blocks : {2, 8, 32}) {
    SCOPED_TRACE(blocks);
    AttentionResults<double> got = layer.exact;
    got.dk = InBlocks(layer, blocks, [](float sum) { return sum; });
    EXPECT_TRUE(layer.Refused(got).empty()) << ::testing::PrintToString(layer.Refused(got));
    EXPECT_LE(layer.Growth(got, alone).at("dk"), layer.most_growth("dk"));
    EXPECT_EQ(layer.Growth(got, alone).at("dv"), 0);
    got.dk = InBlocks(layer, blocks, Layer::Round);
    const double growth = layer.Growth(got, alone).at("dk");
    EXPECT_EQ(growth > layer.most_growth("dk"), blocks > 2) << growth;
  }
}

// What is said of roundings of blocks in BlockGradients::kRounded.
TEST(EveryPlanJudge, ErrorsDoNotGrowWithTheBlocks) {
  Communicator alone = MakeLoopbackGroup(1)[0];
  const Layer whole(kSmall, 2, BlockGradients::kRounded, 1), pieces(kSmall, 2, BlockGradients::kRounded, 16);
  for (const auto& [result, growth] : whole.Growth(pieces.naive, alone)) EXPECT_LE(growth, 1.1) << result;
}

TEST(EveryPlanJudge, NaivePassesItself) {
  Communicator alone = MakeLoopbackGroup(1)[0];
  for (const BlockGradients gradients : {BlockGradients::kSummed, BlockGradients::kRounded}) {
    const Layer layer(kSmall, 3, gradients);
    EXPECT_TRUE(layer.Refused(layer.naive).empty());
    for (const auto& [result, growth] : layer.Growth(layer.naive, alone)) EXPECT_EQ(growth, 1) << result;
  }
}

}  // namespace
}  // namespace annulus::testing
