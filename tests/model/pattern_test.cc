#include <gtest/gtest.h>

#include "annulus/base/random.h"
#include "annulus/model/spec.h"

namespace annulus {
namespace {

using Layers = std::vector<LayerSpec>;

LayerSpec Branches(std::vector<BranchSpec> branches, Combine combine = Combine::kSum) {
  return {.branches = std::move(branches), .combine = combine};
}
LayerSpec Attention(int64_t window, std::optional<double> theta) {
  return Branches({{.window = window, .rope_theta = theta}});
}
const LayerSpec kMlp = Branches({{.kind = BranchKind::kMlp}});

std::string ErrorOf(const std::string& pattern) {
  const auto parsed = ParsePattern(pattern, {});
  EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument) << pattern;
  return std::string(parsed.status().message());
}

Layers LayersOf(const std::string& pattern, const PatternDefaults& defaults = {}) {
  const auto parsed = ParsePattern(pattern, defaults);
  EXPECT_TRUE(parsed.ok()) << pattern << ": " << parsed.status();
  return parsed.ok() ? parsed->layers : Layers();
}

TEST(Pattern, ExpandsRepetitionsAndAttributes) {
  const Layers expected = {Attention(128, 10000.0),    kMlp, Attention(128, 10000.0), kMlp,
                           Attention(0, std::nullopt), kMlp};
  EXPECT_EQ(LayersOf("(A{w=128} -)^2 A{rope=none}-"), expected);
}

TEST(Pattern, AttributesReplaceDefaults) {
  const PatternDefaults defaults{64, 5e5, std::nullopt};
  const Layers expected = {Attention(64, 5e5), Attention(0, 5e5), Attention(8, 1e6),
                           Attention(64, std::nullopt)};
  EXPECT_EQ(LayersOf("A A{w=0} A{ rope = 1e6 , w = 8 } A{rope=none}", defaults), expected);
}

TEST(Pattern, SpacesAreOptional) {
  const Layers dense = LayersOf("((A-)^2A{w=3}^2-)^3");
  EXPECT_EQ(dense, LayersOf("  ( ( A - ) ^ 2\tA { w = 3 } ^ 2\n- ) ^ 3 "));
  EXPECT_EQ(dense.size(), 21u);
  EXPECT_EQ(LayersOf("M+A{w=3,combine=mean-norm}^2"), LayersOf("M + A { w = 3 , combine = mean-norm } ^ 2"));
}

TEST(Pattern, EveryBranchHasALetter) {
  const Layers layers = LayersOf("A T M L B G -");
  const std::vector<BranchKind> kinds = {
      BranchKind::kAttention, BranchKind::kLatentAttention, BranchKind::kMamba, BranchKind::kLightning,
      BranchKind::kBased,     BranchKind::kDeltaNet,        BranchKind::kMlp};
  ASSERT_EQ(layers.size(), kinds.size());
  for (size_t i = 0; i < kinds.size(); ++i) {
    ASSERT_EQ(layers[i].branches.size(), 1u);
    EXPECT_EQ(layers[i].branches[0].kind, kinds[i]);
    const bool rotates = i < 2;
    EXPECT_EQ(layers[i].branches[0].rope_theta.has_value(), rotates) << Name(kinds[i]);
  }
}

TEST(Pattern, TheTargetModel) {
  const Layers layers = LayersOf("((M -)^3 T{g=2} -)^2");
  ASSERT_EQ(layers.size(), 16u);
  const LayerSpec mamba = Branches({{.kind = BranchKind::kMamba}});
  const LayerSpec latent =
      Branches({{.kind = BranchKind::kLatentAttention, .rope_theta = 10000.0, .latent_groups = 2}});
  for (size_t i = 0; i < layers.size(); ++i) {
    EXPECT_EQ(layers[i], i % 2 == 1 ? kMlp : i % 8 == 6 ? latent : mamba) << i;
  }
}

TEST(Pattern, BranchesSideBySide) {
  const BranchSpec mamba{.kind = BranchKind::kMamba};
  const BranchSpec attention{.window = 128, .rope_theta = 10000.0};
  EXPECT_EQ(LayersOf("M+A{w=128}"), (Layers{Branches({mamba, attention})}));
  EXPECT_EQ(LayersOf("A+M{combine=sum,w=128}"), (Layers{Branches({attention, mamba})}));
  EXPECT_EQ(LayersOf("A+M{combine=mean-norm,w=128}"),
            (Layers{Branches({attention, mamba}, Combine::kMeanNorm)}));
  // Every branch that has an attribute takes it.
  const Layers both = LayersOf("A+T+M{w=7,rope=none,tie=x}");
  const Layers expected = {Branches({{.window = 7, .tie = "x"},
                                     {.kind = BranchKind::kLatentAttention, .window = 7, .tie = "x"},
                                     {.kind = BranchKind::kMamba, .tie = "x"}})};
  EXPECT_EQ(both, expected);
}

TEST(Pattern, MetaTokensComeFirst) {
  const auto parsed = ParsePattern(" meta = 128 A - ", {});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->meta_tokens, 128);
  EXPECT_EQ(parsed->layers.size(), 2u);
  EXPECT_EQ(ParsePattern("A", {})->meta_tokens, 0);
  EXPECT_EQ(ErrorOf("meta A"), "column 6: `A`: expected =");
  EXPECT_EQ(ErrorOf("meta=A"), "column 6: `A`: expected a number of meta tokens from 1 to 65536");
  EXPECT_EQ(ErrorOf("meta=0 A"), "column 6: `0`: expected a number of meta tokens from 1 to 65536");
  EXPECT_EQ(ErrorOf("meta=65537 A"), "column 6: `65537`: expected a number of meta tokens from 1 to 65536");
  EXPECT_EQ(ErrorOf("A meta=4"), "column 3: `m`: expected A, T, M, L, B, G, - or (");
  EXPECT_EQ(ErrorOf("meta=4"), "column 7: the pattern ends; expected A, T, M, L, B, G, - or (");
}

TEST(Pattern, KeysAndValuesOfAnEarlierLayer) {
  const Layers layers = LayersOf("(M+A - A{kv=@-2,w=4} -)^2 A{kv=own} A{kv=@-1,tie=t} A A{kv=@-1,tie=t}");
  ASSERT_EQ(layers.size(), 12u);
  EXPECT_EQ(layers[2].branches[0].kv_layers_back, 2);
  EXPECT_EQ(layers[8].branches[0].kv_layers_back, 0);
}

TEST(Pattern, KeysAndValuesThatAreNotThere) {
  EXPECT_EQ(ErrorOf("A - A{kv=@-3}"),
            "column 7: kv=@-3: expected an earlier layer with A; 2 layers stand before layer 2");
  EXPECT_EQ(ErrorOf("A - A{w=3,kv=@-1}"),
            "column 11: layer 2 takes keys and values of layer 1, which is -; expected a layer with A");
  EXPECT_EQ(ErrorOf("M+L - A{kv=@-2}"),
            "column 9: layer 2 takes keys and values of layer 0, which is M+L; expected a layer with A");
  EXPECT_EQ(
      ErrorOf("A A{kv=@-1} - A{kv=@-2}"),
      "column 17: layer 3 takes keys and values of layer 1, which has none of its own; expected kv=@-3");
  EXPECT_EQ(
      ErrorOf("A A{kv=@-1,rope=none}"),
      "column 5: layer 1 takes keys and values of layer 0, which has rope=10000; expected the same, got "
      "rope=none");
  EXPECT_EQ(ErrorOf("(A{kv=@-1})^2"),
            "column 4: kv=@-1: expected an earlier layer with A; 0 layers stand before layer 0");
}

TEST(Pattern, TiedBranchesAreEqual) {
  EXPECT_EQ(LayersOf("(M A{tie=shared} -)^3 M+L{tie=b} M+L{tie=b}").size(), 11u);
  EXPECT_EQ(ErrorOf("A{tie=a} - M{tie=a}"),
            "column 14: layers 0 (A) and 2 (M) share the name a; expected the same branches and attributes");
  EXPECT_EQ(ErrorOf("A{tie=a} A{w=2,tie=a}"),
            "column 16: layers 0 (A) and 1 (A) share the name a; expected the same branches and attributes");
  EXPECT_EQ(
      ErrorOf("A+M{tie=a} A{tie=a}"),
      "column 14: layers 0 (A+M) and 1 (A) share the name a; expected the same branches and attributes");
  EXPECT_EQ(ErrorOf("A{tie=a.b}"), "column 7: tie=a.b: expected a name of at most 32 letters, digits or '_'");
  EXPECT_EQ(ErrorOf("A{tie=}"), "column 7: tie=: expected a name of at most 32 letters, digits or '_'");
}

TEST(Pattern, PlannedPartsAreNamed) {
  const std::string planned =
      "E (mixture of experts) is planned but not available; expected A, T, M, L, B, G or -";
  EXPECT_EQ(ErrorOf("- E"), "column 3: " + planned);
  EXPECT_EQ(ErrorOf("A+E"), "column 3: " + planned);
}

TEST(Pattern, AttributesBelongToBranches) {
  EXPECT_EQ(ErrorOf("-{w=1}"), "column 3: the attribute w belongs to A and T; expected none on -");
  EXPECT_EQ(ErrorOf("M+L{rope=none}"),
            "column 5: the attribute rope belongs to A and T; expected none on M+L");
  EXPECT_EQ(ErrorOf("T{kv=own}"), "column 3: the attribute kv belongs to A; expected none on T");
  EXPECT_EQ(ErrorOf("A{g=2}"), "column 3: the attribute g belongs to T; expected none on A");
  EXPECT_EQ(ErrorOf("A{combine=sum}"),
            "column 3: the attribute combine belongs to several branches joined by +; expected none on A");
}

TEST(Pattern, AttributeValuesHaveRanges) {
  EXPECT_EQ(ErrorOf("A{w=-1}"), "column 5: w=-1: expected an integer from 0 (all keys) to 1099511627776");
  EXPECT_EQ(ErrorOf("A{w=}"), "column 5: w=: expected an integer from 0 (all keys) to 1099511627776");
  EXPECT_EQ(ErrorOf("A{rope=nan}"), "column 8: rope=nan: expected none or a number from 1 to 1e+15");
  EXPECT_EQ(ErrorOf("A{rope=0.5}"), "column 8: rope=0.5: expected none or a number from 1 to 1e+15");
  for (const std::string value : {"1", "@1", "@-0", "@-10000", "@-x", "@--1", ""}) {
    EXPECT_EQ(ErrorOf("A A{kv=" + value + "}"),
              "column 8: kv=" + value + ": expected own or @-k with k from 1 to 9999 layers");
  }
  for (const std::string value : {"0", "65", "x"}) {
    EXPECT_EQ(ErrorOf("T{g=" + value + "}"), "column 5: g=" + value + ": expected an integer from 1 to 64");
  }
  EXPECT_EQ(ErrorOf("A+M{combine=mean}"), "column 13: combine=mean: expected sum or mean-norm");
  EXPECT_EQ(ErrorOf("A{w=1,w=2}"), "column 7: the attribute w is given twice; expected once");
}

TEST(Pattern, OtherErrorsNameColumnAndExpectation) {
  const std::string item = "A, T, M, L, B, G, - or (";
  const std::string attribute =
      "an attribute w=window, rope=theta|none, kv=own|@-k, g=groups, tie=name or combine=sum|mean-norm";
  EXPECT_EQ(ErrorOf(""), "column 1: the pattern ends; expected " + item);
  EXPECT_EQ(ErrorOf("A X"), "column 3: `X`: expected " + item);
  EXPECT_EQ(ErrorOf(std::string("A\0", 2)), "column 2: `\\x00`: expected " + item);
  EXPECT_EQ(ErrorOf("()"), "column 2: `)`: expected " + item);
  EXPECT_EQ(ErrorOf("(A -"), "column 5: the pattern ends; expected A, T, M, L, B, G, - or ( or )");
  EXPECT_EQ(ErrorOf("A)"), "column 2: `)`: expected " + item);
  EXPECT_EQ(ErrorOf("A+"), "column 3: the pattern ends; expected A, T, M, L, B, G or -");
  EXPECT_EQ(ErrorOf("A+(M)"), "column 3: `(`: expected A, T, M, L, B, G or -");
  EXPECT_EQ(ErrorOf("A+M+A"), "column 5: `A`: expected each branch of a layer once");
  EXPECT_EQ(ErrorOf("A{w=2} + -"), "column 8: `+`: expected attributes behind the last branch of the layer");
  EXPECT_EQ(ErrorOf("A^"), "column 3: the pattern ends; expected a number of repetitions from 1 to 10000");
  EXPECT_EQ(ErrorOf("A^0"), "column 3: `0`: expected a number of repetitions from 1 to 10000");
  EXPECT_EQ(ErrorOf("A^2^3"), "column 4: `^`: expected " + item);
  EXPECT_EQ(ErrorOf("A^-1"), "column 3: `-`: expected a number of repetitions from 1 to 10000");
  EXPECT_EQ(ErrorOf("A{}"), "column 3: `}`: expected " + attribute);
  EXPECT_EQ(ErrorOf("A{width=3}"), "column 3: `width`: expected " + attribute);
  EXPECT_EQ(ErrorOf("A{w}"), "column 4: `}`: expected =");
  EXPECT_EQ(ErrorOf("A{w=1"), "column 6: the pattern ends; expected , or }");
}

TEST(Pattern, ExpansionAndNestingAreBounded) {
  EXPECT_EQ(LayersOf("(A^100)^100").size(), 10000u);
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
  const std::vector<std::string> pieces = {
      "A", "A", "-", "-", "M", "T", "(", "(", ")",     ")",       "^",         "^",       "{",
      "}", "{", "}", ",", "=", "+", "w", "9", "w=1",   "kv=@-1",  "kv=@-2",    "tie=a",   "g=2",
      ".", " ", "E", "x", "0", "1", "B", "G", "meta=", "combine", "mean-norm", "{tie=a}", "{kv=@-2}"};
  const RandomStream random(7, "patterns");
  int accepted = 0;
  for (uint64_t n = 0; n < 4000; ++n) {
    std::string pattern;
    const uint64_t length = random.Below(n * 64, 24);
    for (uint64_t i = 0; i < length; ++i) pattern += pieces[random.Below(n * 64 + 1 + i, pieces.size())];
    const auto parsed = ParsePattern(pattern, {});
    if (parsed.ok()) {
      ++accepted;
      EXPECT_TRUE(!parsed->layers.empty() && parsed->layers.size() <= 10000) << pattern;
    } else {
      EXPECT_EQ(parsed.status().message().substr(0, 7), "column ") << pattern;
    }
  }
  EXPECT_GT(accepted, 10);  // the pieces are such that both outcomes occur
  EXPECT_LT(accepted, 3990);
}

}  // namespace
}  // namespace annulus
