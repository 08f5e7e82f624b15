// What a token may influence, across ranks: found by changing it and looking at every logit.

#include <gtest/gtest.h>

#include "model/named_specs.h"

namespace annulus::testing {
namespace {

constexpr int64_t kLength = 30;  // not a multiple of 4 ranks
constexpr int kRanks = 4;

class Causality : public ::testing::TestWithParam<LayoutKind> {
 protected:
  // Positions of `item` whose logits are not the same bits after another token stands at `position`. Masked
  // keys have weight zero, so whatever they hold adds nothing: the test is for equality.
  std::vector<int64_t> Influenced(const ModelSpec& spec, const WholeBatch& batch, int64_t item,
                                  int64_t position) {
    const MeshRun run{.layout = GetParam(), .cp = kRanks};
    if (baseline_.empty()) baseline_ = Logits(spec, batch, run);
    WholeBatch changed = batch;
    int32_t& token = changed.tokens[static_cast<size_t>(item)][static_cast<size_t>(position)];
    token = (token + 1) % static_cast<int32_t>(spec.vocab_size);
    const std::vector<double> logits = Logits(spec, changed, run);
    std::vector<int64_t> influenced;
    for (int64_t i = 0; i < batch.sequences.batch; ++i) {
      for (int64_t p = 0; p < kLength; ++p) {
        const auto begin = (i * kLength + p) * spec.vocab_size;
        if (std::equal(logits.begin() + begin, logits.begin() + begin + spec.vocab_size,
                       baseline_.begin() + begin)) {
          continue;
        }
        EXPECT_EQ(i, item) << "another sequence changed at " << p;
        influenced.push_back(p);
      }
    }
    return influenced;
  }

 private:
  std::vector<double> baseline_;
};

INSTANTIATE_TEST_SUITE_P(Layouts, Causality, ::testing::ValuesIn(kLayouts),
                         [](const auto& info) { return NameOf(info.param); });

std::vector<int64_t> Range(int64_t begin, int64_t end) {
  std::vector<int64_t> range;
  for (int64_t p = begin; p < end; ++p) range.push_back(p);
  return range;
}

TEST_P(Causality, ATokenChangesItselfAndWhatFollows) {
  const ModelSpec spec = SmallSpec({Attention(0), Mlp(), Attention(0), Mlp()});
  const WholeBatch batch = RandomBatch(spec, {.length = kLength, .batch = 2});
  for (int64_t position = 0; position < kLength; position += 3) {
    EXPECT_EQ(Influenced(spec, batch, position % 2, position), Range(position, kLength)) << position;
  }
}

TEST_P(Causality, ADocumentMaskStopsAtTheDocument) {
  const ModelSpec spec = SmallSpec({Attention(0), Mlp(), Attention(0), Mlp()});
  WholeBatch batch = RandomBatch(spec, {.length = kLength, .batch = 1});
  const std::vector<int64_t> starts = {0, 4, 5, 17, kLength};
  batch.sequences.document_starts.emplace_back();
  for (size_t d = 0; d + 1 < starts.size(); ++d) {
    for (int64_t p = starts[d]; p < starts[d + 1]; ++p)
      batch.sequences.document_starts[0].push_back(starts[d]);
  }
  for (size_t d = 0; d + 1 < starts.size(); ++d) {
    for (const int64_t position : {starts[d], (starts[d] + starts[d + 1]) / 2, starts[d + 1] - 1}) {
      EXPECT_EQ(Influenced(spec, batch, 0, position), Range(position, starts[d + 1])) << position;
    }
  }
}

// A layer of window w reaches w - 1 tokens further.
TEST_P(Causality, AWindowStopsAtTheSumOfTheReaches) {
  const ModelSpec spec = SmallSpec({Attention(4), Mlp(), Attention(3), Attention(6, std::nullopt), Mlp()});
  constexpr int64_t kReach = 3 + 2 + 5;
  const WholeBatch batch = RandomBatch(spec, {.length = kLength, .batch = 1});
  for (int64_t position = 0; position < kLength; position += 5) {
    const int64_t end = std::min(kLength, position + kReach + 1);
    EXPECT_EQ(Influenced(spec, batch, 0, position), Range(position, end)) << position;
  }
}

// A token of the padding of a short sequence reaches nothing.
TEST_P(Causality, PaddingReachesNothing) {
  const ModelSpec spec = SmallSpec({Attention(0), Mlp(), Attention(0), Mlp()});
  WholeBatch batch = RandomBatch(spec, {.length = kLength, .batch = 2});
  constexpr int64_t kShort = 11;
  batch.sequences.lengths[1] = kShort;
  for (const int64_t position : {kShort, kShort + 4, kLength - 1}) {
    EXPECT_EQ(Influenced(spec, batch, 1, position), Range(position, position + 1)) << position;
  }
  EXPECT_EQ(Influenced(spec, batch, 1, kShort - 1), Range(kShort - 1, kShort));
}

// Whatever a model is made of: nothing before a token, of another sequence or of another document depends on
// it.
using CausalityOfSpecs = OnNamedSpecs;
INSTANTIATE_TEST_SUITE_P(Specs, CausalityOfSpecs, ::testing::ValuesIn(NamedSpecs()), NameOfSpec);

TEST_P(CausalityOfSpecs, ATokenChangesWhatFollowsInItsDocumentAlone) {
  const ModelSpec& spec = GetParam().spec;
  const WholeBatch batch = RandomBatch(spec, GetParam().batch);
  const MeshRun run{.cp = 2, .tp = ValidateShards(spec, 2).ok() ? 2 : 3};
  const std::vector<double> before = Logits(spec, batch, run);
  constexpr size_t kItem = 0;  // of full length
  for (int64_t position = 0; position < batch.length; position += 9) {
    WholeBatch changed = batch;
    int32_t& token = changed.tokens[kItem][static_cast<size_t>(position)];
    token = (token + 1) % static_cast<int32_t>(spec.vocab_size);
    const std::vector<double> after = Logits(spec, changed, run);
    const int64_t document = DocumentStart(batch.sequences, kItem, position);
    for (int64_t i = 0; i < batch.sequences.batch; ++i) {
      for (int64_t p = 0; p < batch.length; ++p) {
        const auto begin = (i * batch.length + p) * spec.vocab_size;
        const bool same = std::equal(after.begin() + begin, after.begin() + begin + spec.vocab_size,
                                     before.begin() + begin);
        const bool may_change =
            i == kItem && p >= position && DocumentStart(batch.sequences, kItem, p) == document;
        EXPECT_TRUE(same || may_change) << "token " << position << " changed item " << i << " at " << p;
        if (i == kItem && p == position) {
          EXPECT_FALSE(same) << position;
        }
      }
    }
  }
}

TEST(RotaryDim, IsOfTheLastElementsOfAHead) {
  const auto logits = [](int64_t rotary_dim, std::optional<double> theta) {
    const ModelSpec spec = WithRotary(rotary_dim, SmallSpec({Attention(0, theta)}));
    return Logits(spec, RandomBatch(spec, {.length = kLength}), {});
  };
  EXPECT_EQ(logits(0, 100), logits(6, 100));  // a whole head
  for (const int64_t dim : {2, 4}) {
    EXPECT_NE(logits(dim, 100), logits(6, 100)) << dim;
    EXPECT_NE(logits(dim, 100), logits(dim, std::nullopt)) << dim;
  }
}

TEST(RopeTheta, BelongsToItsLayer) {
  const auto logits = [](std::optional<double> first, std::optional<double> second) {
    const ModelSpec spec = SmallSpec({Attention(0, first), Attention(0, second)});
    return Logits(spec, RandomBatch(spec, {.length = kLength}), {});
  };
  EXPECT_NE(logits(100, 100), logits(100, 50));
  EXPECT_NE(logits(100, 100), logits(50, 100));
  EXPECT_NE(logits(100, 100), logits(100, std::nullopt));
  EXPECT_NE(logits(50, 100), logits(100, 50));
}

}  // namespace
}  // namespace annulus::testing
