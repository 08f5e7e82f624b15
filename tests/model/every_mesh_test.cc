// Each kind of layer on every mesh of 1 to 4 data-parallel by 1 to 4 context-parallel by 1 to 4
// tensor-parallel ranks, contiguous and zigzag: loss and every gradient are those of one rank, and nothing
// before a token depends on it, whichever ranks lie between. Models that cannot be split so, recompute
// policies and striped attention: parity_test.cc.

#include <gtest/gtest.h>

#include "model/named_specs.h"

namespace annulus::testing {
namespace {

constexpr LayoutKind kOrdered[] = {LayoutKind::kContiguous, LayoutKind::kZigzag};
constexpr int kMostRanks = 4;  // of an axis

struct Splittable {
  const char* name;
  ModelSpec spec;
  int64_t reach = -1;  // positions behind a token that depend on it; negative: all
};
void PrintTo(const Splittable& s, std::ostream* out) { *out << s.name; }

// Twelve heads of everything.
ModelSpec TwelveHeads(std::vector<LayerSpec> layers) {
  constexpr int64_t kGroups = 12, kConv = 3, kQueryRank = 6;
  ModelSpec spec = WithLatents(kQueryRank, WithStates(kGroups, kConv, SmallSpec(std::move(layers))));
  spec.heads = 12, spec.kv_heads = 12, spec.head_dim = 4, spec.d_ff = 24;
  spec.latent.heads = 12;
  return spec;
}
ModelSpec WithOneGroup(ModelSpec spec) {
  spec.kv_heads = 1, spec.mamba.groups = 1;
  return spec;
}
ModelSpec WithFullQueries(ModelSpec spec) {
  spec.latent.q_rank = 0;
  return spec;
}

std::vector<Splittable> Splittables() {
  const BranchSpec attention = AttentionBranch(0), mlp = MlpBranch(), mamba{.kind = BranchKind::kMamba};
  const BranchSpec latent = Latent(1).branches[0];
  const LayerSpec beside = Layer({mamba, attention}), mean = Layer({mamba, attention}, Combine::kMeanNorm);
  return {
      {"attention", TwelveHeads({Attention(0), Mlp()})},
      {"window_of_one_kv_head", WithOneGroup(TwelveHeads({Attention(5)})), 4},
      {"mlp", TwelveHeads({Mlp(), Mlp()}), 0},
      {"latent", TwelveHeads({Latent(1), Mlp()})},
      {"latent_full_queries", WithFullQueries(TwelveHeads({Latent(1)}))},
      {"latent_branches", TwelveHeads({Latent(2), Latent(4)})},
      {"mamba", TwelveHeads({Recurrent(BranchKind::kMamba), Mlp()})},
      {"mamba_one_group", WithOneGroup(TwelveHeads({Recurrent(BranchKind::kMamba)}))},
      {"lightning", TwelveHeads({Recurrent(BranchKind::kLightning), Mlp()})},
      {"based", TwelveHeads({Recurrent(BranchKind::kBased), Mlp()})},
      {"delta_net", TwelveHeads({Recurrent(BranchKind::kDeltaNet), Mlp()})},
      {"mamba_beside_attention", TwelveHeads({beside})},
      {"mamba_beside_attention_mean_norm", WithOneGroup(TwelveHeads({mean}))},
      {"latent_beside_mamba_and_mlp", WithFullQueries(TwelveHeads({Layer({latent, mamba, mlp})}))},
  };
}

class EveryMesh : public ::testing::TestWithParam<Splittable> {
 protected:
  static void SetUpTestSuite() { contexts_ = KeepContexts(kMostRanks * kMostRanks * kMostRanks); }
  static void TearDownTestSuite() { contexts_.clear(); }
  static inline KeptContexts contexts_;
};
INSTANTIATE_TEST_SUITE_P(Kinds, EveryMesh, ::testing::ValuesIn(Splittables()),
                         [](const auto& info) { return std::string(info.param.name); });

// Twelve sequences are shared out evenly by 1 to 4 ranks; 21 positions have padding, and segments shorter
// than convolutions.
TEST_P(EveryMesh, LossAndEveryGradientAreThoseOfOneRank) {
  const ModelSpec& spec = GetParam().spec;
  const WholeBatch batch = RandomBatch(
      spec, {.length = 21, .batch = 12, .lengths = Lengths::kRandom, .documents = Documents::kRandom});
  const Outcome one = Train(spec, batch, {});
  for (int ranks = 0; ranks < kMostRanks * kMostRanks * kMostRanks; ++ranks) {
    const int dp = 1 + ranks / (kMostRanks * kMostRanks), cp = 1 + ranks / kMostRanks % kMostRanks,
              tp = 1 + ranks % kMostRanks;
    for (const LayoutKind layout : kOrdered) {
      if (cp == 1 && layout == LayoutKind::kZigzag) continue;  // is contiguous
      SCOPED_TRACE(::testing::Message() << NameOf(layout) << " dp " << dp << " cp " << cp << " tp " << tp);
      ExpectSame(Train(spec, batch, {.layout = layout, .dp = dp, .cp = cp, .tp = tp, .contexts = &contexts_}),
                 one, 1e-12);
    }
  }
}

// Among more than eight ranks states are scanned instead of gathered.
TEST_P(EveryMesh, NineRanksOfASequenceAreOneRank) {
  const ModelSpec& spec = GetParam().spec;
  const WholeBatch batch = RandomBatch(
      spec, {.length = 40, .batch = 2, .lengths = Lengths::kRandom, .documents = Documents::kRandom});
  const Outcome one = Train(spec, batch, {});
  for (const LayoutKind layout : kOrdered) {
    for (const int tp : {1, 2}) {
      SCOPED_TRACE(::testing::Message() << NameOf(layout) << " tp " << tp);
      ExpectSame(Train(spec, batch, {.layout = layout, .cp = 9, .tp = tp, .contexts = &contexts_}), one,
                 1e-12);
    }
  }
}

// Sequence i has another token at position i: one pass shows what every position reaches.
struct Reached {
  int64_t length;
  std::vector<bool> changed;  // [item][position]
  bool At(int64_t item, int64_t position) const {
    return changed[static_cast<size_t>(item * length + position)];
  }
};
Reached Reach(const ModelSpec& spec, const WholeBatch& batch, const MeshRun& run) {
  WholeBatch other = batch;
  for (size_t i = 0; i < other.tokens.size(); ++i) {
    int32_t& token = other.tokens[i][i];
    token = (token + 1) % static_cast<int32_t>(spec.vocab_size);
  }
  const std::vector<double> before = Logits(spec, batch, run), after = Logits(spec, other, run);
  Reached reached{.length = batch.length, .changed = {}};
  for (int64_t row = 0; row < batch.length * batch.length; ++row) {
    const auto begin = row * spec.vocab_size;
    reached.changed.push_back(
        !std::equal(after.begin() + begin, after.begin() + begin + spec.vocab_size, before.begin() + begin));
  }
  return reached;
}

// Every position is perturbed, those on either side of each boundary between ranks among them. Not a bit
// changes before it or in another document; and behind it all does that the layer reaches, so that a rank
// which hands nothing on is found too.
TEST_P(EveryMesh, ATokenReachesWhatFollowsItInItsDocument) {
  const ModelSpec& spec = GetParam().spec;
  constexpr int64_t kLength = 19;
  for (const Documents documents : {Documents::kNone, Documents::kRandom}) {
    const WholeBatch batch = RandomBatch(spec, {.length = kLength, .batch = kLength, .documents = documents});
    for (int cp = 2; cp <= kMostRanks; ++cp) {
      for (int tp = 1; tp <= kMostRanks; ++tp) {
        for (const LayoutKind layout : kOrdered) {
          SCOPED_TRACE(::testing::Message() << NameOf(layout) << " cp " << cp << " tp " << tp);
          const Reached reached =
              Reach(spec, batch, {.layout = layout, .cp = cp, .tp = tp, .contexts = &contexts_});
          for (int64_t token = 0; token < kLength; ++token) {
            const int64_t end = GetParam().reach < 0 ? kLength : token + GetParam().reach + 1;
            for (int64_t p = 0; p < kLength; ++p) {
              const bool follows = p >= token && p < end && Sees(batch.sequences, 0, token, p, token);
              EXPECT_EQ(reached.At(token, p), follows) << "token " << token << ", position " << p;
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace annulus::testing
