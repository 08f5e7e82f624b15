#include <gtest/gtest.h>

#include <limits>

#include "annulus/base/random.h"
#include "annulus/model/spec.h"

namespace annulus {
namespace {

constexpr LayerSpec kMlp{LayerKind::kMlp, 0, std::nullopt};

LayerSpec Attention(int64_t window, std::optional<double> theta) {
  return {LayerKind::kAttention, window, theta};
}

std::string ErrorOf(const std::string& pattern) {
  const auto layers = ParsePattern(pattern, {});
  EXPECT_EQ(layers.status().code(), absl::StatusCode::kInvalidArgument) << pattern;
  return std::string(layers.status().message());
}

TEST(Pattern, ExpandsRepetitionsAndAttributes) {
  const auto layers = ParsePattern("(A{w=128} -)^2 A{rope=none}-", {});
  ASSERT_TRUE(layers.ok()) << layers.status();
  const std::vector<LayerSpec> expected = {Attention(128, 10000.0),    kMlp, Attention(128, 10000.0), kMlp,
                                           Attention(0, std::nullopt), kMlp};
  EXPECT_EQ(*layers, expected);
}

TEST(Pattern, AttributesReplaceDefaults) {
  const PatternDefaults defaults{64, 5e5};
  const auto layers = ParsePattern("A A{w=0} A{ rope = 1e6 , w = 8 } A{rope=none}", defaults);
  ASSERT_TRUE(layers.ok()) << layers.status();
  const std::vector<LayerSpec> expected = {Attention(64, 5e5), Attention(0, 5e5), Attention(8, 1e6),
                                           Attention(64, std::nullopt)};
  EXPECT_EQ(*layers, expected);
}

TEST(Pattern, SpacesAreOptional) {
  const auto dense = ParsePattern("((A-)^2A{w=3}^2-)^3", {});
  const auto loose = ParsePattern("  ( ( A - ) ^ 2\tA { w = 3 } ^ 2\n- ) ^ 3 ", {});
  ASSERT_TRUE(dense.ok()) << dense.status();
  ASSERT_TRUE(loose.ok()) << loose.status();
  EXPECT_EQ(*dense, *loose);
  EXPECT_EQ(dense->size(), 21u);
}

TEST(Pattern, PlannedPartsAreNamed) {
  EXPECT_EQ(ErrorOf("(A M)"), "column 4: M (Mamba-2) is planned but not available; expected A or -");
  EXPECT_EQ(ErrorOf("L"), "column 1: L (lightning attention) is planned but not available; expected A or -");
  EXPECT_EQ(ErrorOf("G"), "column 1: G (gated DeltaNet) is planned but not available; expected A or -");
  EXPECT_EQ(ErrorOf("B"),
            "column 1: B (BASED linear attention) is planned but not available; expected A or -");
  EXPECT_EQ(ErrorOf("T{g=2}"),
            "column 1: T (latent attention) is planned but not available; expected A or -");
  EXPECT_EQ(ErrorOf("- E"), "column 3: E (mixture of experts) is planned but not available; expected A or -");
  EXPECT_EQ(ErrorOf("A+M"), "column 2: `+`: parallel branches are planned but not available");
  EXPECT_EQ(ErrorOf("A{w=2} + -"), "column 8: `+`: parallel branches are planned but not available");
  EXPECT_EQ(ErrorOf(" meta=4 A"), "column 2: meta tokens (meta=n) are planned but not available");
  EXPECT_EQ(ErrorOf("A{kv=@-1}"),
            "column 3: the attribute kv is planned but not available; expected w or rope");
  EXPECT_EQ(ErrorOf("A{w=1,tie=a}"),
            "column 7: the attribute tie is planned but not available; expected w or rope");
  EXPECT_EQ(ErrorOf("A{g=2}"), "column 3: the attribute g is planned but not available; expected w or rope");
  EXPECT_EQ(ErrorOf("A{combine=sum}"),
            "column 3: the attribute combine is planned but not available; expected w or rope");
}

TEST(Pattern, OtherErrorsNameColumnAndExpectation) {
  EXPECT_EQ(ErrorOf(""), "column 1: the pattern ends; expected A, - or (");
  EXPECT_EQ(ErrorOf("A X"), "column 3: `X`: expected A, - or (");
  EXPECT_EQ(ErrorOf(std::string("A\0", 2)), "column 2: `\\x00`: expected A, - or (");
  EXPECT_EQ(ErrorOf("()"), "column 2: `)`: expected A, - or (");
  EXPECT_EQ(ErrorOf("(A -"), "column 5: the pattern ends; expected A, -, ( or )");
  EXPECT_EQ(ErrorOf("A)"), "column 2: `)`: expected A, - or (");
  EXPECT_EQ(ErrorOf("A^"), "column 3: the pattern ends; expected a number of repetitions from 1 to 10000");
  EXPECT_EQ(ErrorOf("A^0"), "column 3: `0`: expected a number of repetitions from 1 to 10000");
  EXPECT_EQ(ErrorOf("A^2^3"), "column 4: `^`: expected A, - or (");
  EXPECT_EQ(ErrorOf("A^-1"), "column 3: `-`: expected a number of repetitions from 1 to 10000");
  EXPECT_EQ(ErrorOf("A{}"), "column 3: `}`: expected an attribute w=window or rope=theta|none");
  EXPECT_EQ(ErrorOf("A{width=3}"), "column 3: `w`: expected an attribute w=window or rope=theta|none");
  EXPECT_EQ(ErrorOf("A{w}"), "column 4: `}`: expected =");
  EXPECT_EQ(ErrorOf("A{w=-1}"), "column 5: w=-1: expected an integer from 0 (all keys) to 1099511627776");
  EXPECT_EQ(ErrorOf("A{w=}"), "column 5: w=: expected an integer from 0 (all keys) to 1099511627776");
  EXPECT_EQ(ErrorOf("A{rope=nan}"), "column 8: rope=nan: expected none or a number from 1 to 1e+15");
  EXPECT_EQ(ErrorOf("A{rope=0.5}"), "column 8: rope=0.5: expected none or a number from 1 to 1e+15");
  EXPECT_EQ(ErrorOf("A{w=1,w=2}"), "column 7: the attribute w is given twice; expected once");
  EXPECT_EQ(ErrorOf("A{w=1"), "column 6: the pattern ends; expected , or }");
  EXPECT_EQ(ErrorOf("-{w=1}"), "column 3: the attribute w belongs to A; expected none on -");
}

TEST(Pattern, ExpansionAndNestingAreBounded) {
  const auto most = ParsePattern("(A^100)^100", {});
  ASSERT_TRUE(most.ok()) << most.status();
  EXPECT_EQ(most->size(), 10000u);
  EXPECT_EQ(ErrorOf("- (A^100)^100"),
            "column 3: the pattern expands to 10001 layers or more; expected at most 10000");
  EXPECT_EQ(ErrorOf("((((A)^999)^999)^999)^999"),
            "column 3: the pattern expands to 998001 layers or more; expected at most 10000");
  EXPECT_EQ(ErrorOf("A^99999999999999999999999"),
            "column 3: `99999999999999999999`: expected a number of repetitions from 1 to 10000");
  EXPECT_TRUE(ParsePattern(std::string(64, '(') + "A" + std::string(64, ')'), {}).ok());
  EXPECT_EQ(ErrorOf(std::string(100000, '(')),
            "column 66: parentheses nest too deep; expected at most 64 levels");
}

// Any text gives layers within the bounds or an error that names a column.
TEST(Pattern, RandomTextsNeverCrash) {
  const std::string pieces = "AA--((()))^^{{}},,==+w9x01.M \t";
  const RandomStream random(7, "patterns");
  int accepted = 0;
  for (uint64_t n = 0; n < 4000; ++n) {
    std::string pattern;
    const uint64_t length = random.Below(n * 64, 24);
    for (uint64_t i = 0; i < length; ++i) pattern += pieces[random.Below(n * 64 + 1 + i, pieces.size())];
    const auto layers = ParsePattern(pattern, {});
    if (layers.ok()) {
      ++accepted;
      EXPECT_TRUE(!layers->empty() && layers->size() <= 10000) << pattern;
    } else {
      EXPECT_EQ(layers.status().message().substr(0, 7), "column ") << pattern;
    }
  }
  EXPECT_GT(accepted, 10);  // the pieces are such that both outcomes occur
  EXPECT_LT(accepted, 3990);
}

ModelSpec Small() {
  return {.d_model = 16,
          .vocab_size = 32,
          .heads = 4,
          .kv_heads = 2,
          .head_dim = 4,
          .d_ff = 24,
          .layers = {Attention(0, 10000.0), kMlp}};
}

std::string Finding(const ModelSpec& spec) { return std::string(Validate(spec).message()); }

TEST(ValidateModel, TakesAWholeSpec) { EXPECT_TRUE(Validate(Small()).ok()) << Validate(Small()); }

TEST(ValidateModel, NamesEveryFieldThatDoesNotFit) {
  ModelSpec spec = Small();
  spec.heads = 6, spec.kv_heads = 4;
  EXPECT_EQ(Finding(spec),
            "model.attention.heads=6: expected a multiple of model.attention.kv_heads=4 "
            "(nearest valid value 4 or 8)");
  spec = Small();
  spec.heads = 3, spec.kv_heads = 4;
  EXPECT_EQ(Finding(spec),
            "model.attention.heads=3: expected a multiple of model.attention.kv_heads=4 "
            "(nearest valid value 4)");
  spec = Small();
  spec.head_dim = 5;
  EXPECT_EQ(Finding(spec),
            "model.attention.head_dim=5: expected an even number of at least 2 "
            "(nearest valid value 4 or 6)");
  spec = Small();
  spec.d_model = 0, spec.d_ff = -1;
  EXPECT_EQ(Finding(spec),
            "model.d_model=0: expected at least 1 (nearest valid value 1)\n"
            "model.mlp.d_ff=-1: expected at least 1 (nearest valid value 1)");
  spec = Small();
  spec.norm_eps = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(Finding(spec), "model.norm_eps=nan: expected a finite number above 0");
  spec = Small();
  spec.layers.clear();
  EXPECT_EQ(Finding(spec), "model.layers=[]: expected at least one layer");
  spec = Small();
  spec.layers[0].window = -1;
  EXPECT_EQ(Finding(spec), "model.layers[0].window=-1: expected at least 0, where 0 is all");
}

}  // namespace
}  // namespace annulus
