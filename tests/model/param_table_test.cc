// Names, shapes, order and shares of parameters.

#include <gtest/gtest.h>

#include <map>
#include <numeric>

#include "annulus/model/params.h"
#include "model/every_kind.h"

namespace annulus::testing {
namespace {

std::string Places(const ParamTable& table) {
  std::string text;
  for (const ParamInfo& info : table.params) {
    absl::StrAppend(&text, info.name, " ", ToString(info.shape), " bucket ", info.bucket, " at ", info.offset,
                    "\n");
  }
  return text;
}

// "name [local shape]" of a layer's parameters in order, without the prefix.
std::string LayerOf(const ParamTable& table, const std::string& prefix) {
  std::string text;
  for (const ParamInfo& info : table.params) {
    if (info.name.compare(0, prefix.size(), prefix) != 0) continue;
    absl::StrAppend(&text, info.name.substr(prefix.size()), " ", ToString(info.shape), "\n");
  }
  return text;
}

const ParamInfo& Find(const ParamTable& table, absl::string_view name) {
  return table.params[static_cast<size_t>(table.IndexOf(name))];
}

TEST(ParamTable, NamesShapesAndPlaces) {
  const ParamTable table =
      BuildParamTable(EveryKind({Layer(BranchKind::kAttention), Layer(BranchKind::kMlp)}));
  EXPECT_EQ(Places(table),
            "embed.weight [29, 16] bucket 0 at 0\n"
            "layers.0.norm.weight [16] bucket 1 at 0\n"
            "layers.0.attention.q.weight [48, 16] bucket 1 at 16\n"
            "layers.0.attention.k.weight [24, 16] bucket 1 at 784\n"
            "layers.0.attention.v.weight [24, 16] bucket 1 at 1168\n"
            "layers.0.attention.o.weight [16, 48] bucket 1 at 1552\n"
            "layers.1.norm.weight [16] bucket 2 at 0\n"
            "layers.1.mlp.gate.weight [20, 16] bucket 2 at 16\n"
            "layers.1.mlp.up.weight [20, 16] bucket 2 at 336\n"
            "layers.1.mlp.down.weight [16, 20] bucket 2 at 656\n"
            "final_norm.weight [16] bucket 3 at 0\n"
            "head.weight [29, 16] bucket 3 at 16\n");
  std::vector<int64_t> elements;
  for (const Bucket& bucket : table.buckets) elements.push_back(bucket.elements);
  EXPECT_EQ(elements, (std::vector<int64_t>{464, 2320, 976, 480}));
  EXPECT_EQ(table.elements(), 464 + 2320 + 976 + 480);
  EXPECT_EQ(table.logical_elements(), table.elements());
}

TEST(ParamTable, BranchesOfEveryKind) {
  const auto names = [](const LayerSpec& layer) {
    return LayerOf(BuildParamTable(EveryKind({layer})), "layers.0.");
  };
  EXPECT_EQ(names(Layer({.kind = BranchKind::kLatentAttention, .latent_groups = 2})),
            "norm.weight [16]\n"
            "latent.q_norm.weight [7]\n"
            "latent.q_down.weight [7, 16]\n"
            "latent.kv_norm.weight [12]\n"
            "latent.kv_down.weight [12, 16]\n"
            "latent.k_rope.weight [2, 16]\n"
            "latent.q_up.weight [40, 7]\n"
            "latent.kv_up.0.weight [64, 6]\n"
            "latent.kv_up.1.weight [64, 6]\n"
            "latent.o.weight [16, 40]\n");
  EXPECT_EQ(names(Layer(BranchKind::kMamba)),
            "norm.weight [16]\n"
            "mamba.b.weight [44, 16]\n"
            "mamba.c.weight [44, 16]\n"
            "mamba.x.weight [72, 16]\n"
            "mamba.z.weight [72, 16]\n"
            "mamba.dt.weight [8, 16]\n"
            "mamba.out.weight [16, 72]\n"
            "mamba.conv_b.weight [44, 4]\n"
            "mamba.conv_c.weight [44, 4]\n"
            "mamba.conv_x.weight [72, 4]\n"
            "mamba.conv_b.bias [44]\n"
            "mamba.conv_c.bias [44]\n"
            "mamba.conv_x.bias [72]\n"
            "mamba.norm.weight [72]\n"
            "mamba.a_log [8]\n"
            "mamba.d [8]\n"
            "mamba.dt_bias [8]\n");
  EXPECT_EQ(names(Layer(BranchKind::kLightning)),
            "norm.weight [16]\n"
            "lightning.norm.weight [13]\n"
            "lightning.q.weight [12, 16]\n"
            "lightning.k.weight [12, 16]\n"
            "lightning.v.weight [52, 16]\n"
            "lightning.gate.weight [52, 16]\n"
            "lightning.out.weight [16, 52]\n");
  EXPECT_EQ(names(Layer(BranchKind::kBased)),
            "norm.weight [16]\n"
            "based.q.weight [12, 16]\n"
            "based.k.weight [12, 16]\n"
            "based.v.weight [40, 16]\n"
            "based.out.weight [16, 40]\n");
  EXPECT_EQ(names(Layer(BranchKind::kDeltaNet)),
            "norm.weight [16]\n"
            "delta.norm.weight [14]\n"
            "delta.q.weight [12, 16]\n"
            "delta.k.weight [12, 16]\n"
            "delta.v.weight [56, 16]\n"
            "delta.gate.weight [56, 16]\n"
            "delta.beta.weight [4, 16]\n"
            "delta.decay.weight [4, 16]\n"
            "delta.out.weight [16, 56]\n"
            "delta.conv_q.weight [12, 2]\n"
            "delta.conv_k.weight [12, 2]\n"
            "delta.conv_v.weight [56, 2]\n"
            "delta.a_log [4]\n"
            "delta.dt_bias [4]\n");
}

TEST(ParamTable, WhatIsLeftAwayHasNoParameters) {
  ModelSpec spec =
      EveryKind({Layer(BranchKind::kLatentAttention), Layer(BranchKind::kDeltaNet), Layer(BranchKind::kMlp),
                 Layer(BranchKind::kAttention), Layer(BranchSpec{.kv_layers_back = 1})});
  spec.latent.q_rank = 0, spec.delta.conv = 0, spec.activation = Activation::kReluSquared;
  const ParamTable table = BuildParamTable(spec);
  EXPECT_EQ(LayerOf(table, "layers.0."),
            "norm.weight [16]\n"
            "latent.kv_norm.weight [12]\n"
            "latent.kv_down.weight [12, 16]\n"
            "latent.k_rope.weight [2, 16]\n"
            "latent.q_up.weight [40, 16]\n"
            "latent.kv_up.0.weight [64, 12]\n"
            "latent.o.weight [16, 40]\n");
  EXPECT_EQ(LayerOf(table, "layers.1.delta.conv"), "");
  EXPECT_EQ(LayerOf(table, "layers.2."),
            "norm.weight [16]\nmlp.up.weight [20, 16]\nmlp.down.weight [16, 20]\n");
  EXPECT_EQ(LayerOf(table, "layers.4."),
            "norm.weight [16]\nattention.q.weight [48, 16]\nattention.o.weight [16, 48]\n");
}

TEST(ParamTable, ATiedHeadIsTheEmbedding) {
  ModelSpec spec = EveryKind({Layer(BranchKind::kAttention), Layer(BranchKind::kMlp)});
  const std::string untied = Fingerprint(BuildParamTable(spec));
  spec.tied_head = true;
  const ParamTable table = BuildParamTable(spec);
  EXPECT_EQ(table.buckets.back().elements, 16);
  std::string expected = untied;
  const std::string head = "head.weight [29, 16]\n";
  expected.erase(expected.find(head), head.size());
  EXPECT_EQ(Fingerprint(table), expected);
}

TEST(ParamTable, MetaTokensFollowTheRowsOfRankZero) {
  ModelSpec spec = EveryKind({Layer(BranchKind::kMlp)});
  spec.meta_tokens = 3;
  const ParamTable one = BuildParamTable(spec, {0, 4}), other = BuildParamTable(spec, {3, 4});
  EXPECT_EQ(LayerOf(one, "embed"), ".weight [8, 16]\n");
  EXPECT_EQ(Find(one, "meta.weight").shape, (Shape{3, 16}));
  EXPECT_EQ(Find(one, "meta.weight").offset, 8 * 16);
  EXPECT_EQ(Find(other, "meta.weight").shape, (Shape{0, 16}));
  EXPECT_EQ(Find(other, "meta.weight").parts, (std::vector<std::pair<int64_t, int64_t>>{{0, 0}}));
  EXPECT_EQ(Find(other, "embed.weight").parts, (std::vector<std::pair<int64_t, int64_t>>{{22, 29}}));
}

TEST(ParamTable, ResidualProjectionsStartSmallerWithDepth) {
  std::vector<LayerSpec> layers;
  for (const BranchKind kind : kKinds) layers.push_back(Layer(kind));
  layers.resize(9, Layer(BranchKind::kMlp));
  const ParamTable table = BuildParamTable(EveryKind(layers));
  for (const ParamInfo& info : table.params) {
    const std::string_view name = info.name;
    const auto ends = [&](std::string_view end) { return name.ends_with(end); };
    if (ends(".o.weight") || ends(".down.weight") || ends(".out.weight")) {
      EXPECT_DOUBLE_EQ(info.stddev, 0.3 / 3) << name;
      EXPECT_EQ(info.init, Init::kNormal) << name;
    } else if (name.find(".conv_") != std::string_view::npos) {
      EXPECT_EQ(info.init, Init::kUniform) << name;
      const double taps = name.find("mamba") != std::string_view::npos ? 4 : 2;
      EXPECT_DOUBLE_EQ(info.stddev, 1 / std::sqrt(taps)) << name;
    } else if (info.logical.rank() == 2) {
      EXPECT_DOUBLE_EQ(info.stddev, 0.3) << name;
    }
    EXPECT_EQ(info.decay, info.logical.rank() == 2 ? Decay::kWeightDecay : Decay::kNone) << name;
    if (ends("norm.weight") || ends("mamba.d")) {
      EXPECT_EQ(info.init, Init::kOnes) << name;
    }
    if (ends("a_log")) {
      EXPECT_EQ(info.init, Init::kMambaDecay) << name;
    }
    if (ends("dt_bias")) {
      EXPECT_EQ(info.init, Init::kMambaTimeStep) << name;
    }
  }
}

TEST(ParamTable, BranchesSideBySideHaveTheirOwnNorms) {
  LayerSpec layer{.branches = {{.kind = BranchKind::kAttention}, {.kind = BranchKind::kMamba}},
                  .combine = Combine::kMeanNorm};
  const std::string text = LayerOf(BuildParamTable(EveryKind({layer})), "layers.0.");
  EXPECT_EQ(text.find("norm.weight [16]\ncombine.attention.weight [16]\ncombine.mamba.weight [16]\n"), 0u);
  layer.combine = Combine::kSum;
  EXPECT_EQ(LayerOf(BuildParamTable(EveryKind({layer})), "layers.0.combine"), "");
}

TEST(ParamTable, TiedBranchesAreOneBucket) {
  const LayerSpec mlp = Layer({.kind = BranchKind::kMlp, .tie = "one"});
  const LayerSpec mamba = Layer({.kind = BranchKind::kMamba, .tie = "two"});
  const ModelSpec spec = EveryKind({mlp, mamba, Layer(BranchKind::kMlp), mlp, mamba});
  const ParamTable table = BuildParamTable(spec);
  EXPECT_EQ(ParamPrefix(spec, 0, 0), "tied.one.mlp.");
  EXPECT_EQ(ParamPrefix(spec, 2, 0), "layers.2.mlp.");
  EXPECT_EQ(LayerOf(table, "layers.3."), "norm.weight [16]\n");
  EXPECT_EQ(LayerOf(table, "tied.one."),
            "mlp.gate.weight [20, 16]\nmlp.up.weight [20, 16]\nmlp.down.weight [16, 20]\n");
  // Ends and layers, then the two and what is wide.
  ASSERT_EQ(table.buckets.size(), 7u + 2u + 1u);
  for (size_t bucket = 0; bucket < table.buckets.size(); ++bucket) {
    const bool end = bucket == 0 || bucket == 6;
    const BucketUse use = end ? BucketUse::kEnds : bucket < 6 ? BucketUse::kLayer : BucketUse::kShared;
    EXPECT_EQ(table.buckets[bucket].use, use) << bucket;
    EXPECT_EQ(table.buckets[bucket].wide, bucket == 9) << bucket;
  }
  EXPECT_EQ(Find(table, "tied.one.mlp.up.weight").bucket, 7);
  EXPECT_EQ(Find(table, "tied.two.mamba.x.weight").bucket, 8);
  EXPECT_EQ(Find(table, "tied.two.mamba.a_log").bucket, 9);
}

// What every rank holds together is each parameter once, or, where it has no parts, whole on every rank.
// Offsets ascend without gaps, and parameters without parts come first.
void ExpectWhole(const ModelSpec& spec, int ranks) {
  std::map<std::string, std::vector<int>> held;  // by logical element
  std::map<std::string, const ParamInfo*> infos;
  std::vector<ParamTable> tables;
  for (int rank = 0; rank < ranks; ++rank) tables.push_back(BuildParamTable(spec, {rank, ranks}));
  for (const ParamTable& table : tables) {
    EXPECT_EQ(Fingerprint(table), Fingerprint(BuildParamTable(spec)));
    EXPECT_EQ(table.logical_elements(), BuildParamTable(spec).logical_elements());
    std::vector<int64_t> filled(table.buckets.size());
    for (const ParamInfo& info : table.params) {
      const Bucket& bucket = table.buckets[static_cast<size_t>(info.bucket)];
      EXPECT_EQ(info.offset, filled[static_cast<size_t>(info.bucket)]) << info.name;
      filled[static_cast<size_t>(info.bucket)] += info.shape.elements();
      EXPECT_EQ(info.parts.empty(), info.offset < bucket.replicated) << info.name;
      infos[info.name] = &info;
      std::vector<int>& counts = held[info.name];
      counts.resize(static_cast<size_t>(info.logical.elements()));
      int64_t next = 0;
      for (const LogicalRun& run : LogicalRuns(info, 0, info.shape.elements())) {
        EXPECT_EQ(run.local, next) << info.name;
        next += run.elements;
        for (int64_t i = 0; i < run.elements; ++i) ++counts[static_cast<size_t>(run.logical + i)];
      }
      EXPECT_EQ(next, info.shape.elements()) << info.name;
    }
    for (size_t bucket = 0; bucket < filled.size(); ++bucket) {
      EXPECT_EQ(filled[bucket], table.buckets[bucket].elements);
    }
  }
  for (const auto& [name, counts] : held) {
    const int expected = infos[name]->parts.empty() ? ranks : 1;
    EXPECT_EQ(std::count(counts.begin(), counts.end(), expected), static_cast<int64_t>(counts.size()))
        << name;
  }
}

TEST(Shards, RanksTogetherHoldEveryParameter) {
  std::vector<LayerSpec> layers;
  for (const BranchKind kind : kKinds) layers.push_back(Layer(kind));
  layers.push_back({.branches = {{.kind = BranchKind::kAttention}, {.kind = BranchKind::kMamba}},
                    .combine = Combine::kMeanNorm});
  layers.push_back(Layer({.kind = BranchKind::kMamba, .tie = "t"}));
  ModelSpec spec = EveryKind(layers);
  spec.meta_tokens = 2;
  for (const int ranks : {1, 2, 4}) ExpectWhole(spec, ranks);
  spec.d_ff = 24, spec.lightning.heads = spec.based.heads = spec.delta.heads = 8;
  ExpectWhole(spec, 8);  // more than kv heads and groups of B and C
}

// Heads h and latent branches b of kv_up on each rank.
TEST(Shards, LatentGroupsTimesHeadGroups) {
  for (const auto& [groups, ranks] :
       {std::pair(1, 4), {2, 1}, {2, 2}, {2, 4}, {4, 2}, {4, 4}, {4, 8}, {6, 4}}) {
    ModelSpec spec = EveryKind({Layer({.kind = BranchKind::kLatentAttention, .latent_groups = groups})});
    const int64_t kv_dim = 3 + 5, heads = 8;
    std::map<std::pair<int64_t, int64_t>, int> computed;  // (branch, head)
    std::vector<int> outputs(static_cast<size_t>(heads));
    for (int rank = 0; rank < ranks; ++rank) {
      const ParamTable table = BuildParamTable(spec, {rank, ranks});
      const LatentShard mesh = LatentShardOf({rank, ranks}, groups);
      EXPECT_EQ(mesh.latent_groups, std::gcd(groups, ranks));
      EXPECT_EQ(mesh.head_groups * mesh.latent_groups, ranks);
      EXPECT_EQ(mesh.head_group * mesh.latent_groups + mesh.latent_group, rank);
      for (int b = 0; b < groups; ++b) {
        const ParamInfo& info = Find(table, absl::StrCat("layers.0.latent.kv_up.", b, ".weight"));
        EXPECT_EQ(info.shape[0] > 0, mesh.Holds(b));
        EXPECT_EQ(info.shape[1], 12 / groups);
        for (int64_t h = info.parts[0].first / kv_dim; h < info.parts[0].second / kv_dim; ++h) {
          ++computed[{b, h}];
        }
      }
      const auto o = Find(table, "layers.0.latent.o.weight").parts[0];
      for (int64_t h = o.first / 5; h < o.second / 5; ++h) {
        ++outputs[static_cast<size_t>(h)];
        // The rank's heads of the output are among those that it attends with.
        const int64_t each = heads / mesh.head_groups;
        EXPECT_TRUE(h >= mesh.head_group * each && h < (mesh.head_group + 1) * each);
      }
    }
    EXPECT_EQ(computed.size(), static_cast<size_t>(groups * heads)) << groups << " on " << ranks;
    for (const auto& [what, times] : computed) EXPECT_EQ(times, 1);
    EXPECT_EQ(outputs, std::vector<int>(static_cast<size_t>(heads), 1));
  }
}

TEST(Shards, FewerKeysAndValuesOrGroupsThanRanksAreOnEach) {
  ModelSpec spec =
      EveryKind({{.branches = {{.kind = BranchKind::kAttention}, {.kind = BranchKind::kMamba}}}});
  spec.d_ff = 24;
  const ParamTable table = BuildParamTable(spec, {5, 8});
  EXPECT_EQ(LayerOf(table, "layers.0."),
            "norm.weight [16]\n"
            "attention.k.weight [24, 16]\n"
            "attention.v.weight [24, 16]\n"
            "mamba.conv_b.weight [44, 4]\n"
            "mamba.conv_c.weight [44, 4]\n"
            "mamba.conv_b.bias [44]\n"
            "mamba.conv_c.bias [44]\n"
            "mamba.b.weight [44, 16]\n"
            "mamba.c.weight [44, 16]\n"
            "mamba.x.weight [9, 16]\n"
            "mamba.z.weight [9, 16]\n"
            "mamba.dt.weight [1, 16]\n"
            "attention.q.weight [6, 16]\n"
            "attention.o.weight [16, 6]\n"
            "mamba.out.weight [16, 9]\n"
            "mamba.conv_x.weight [9, 4]\n"
            "mamba.conv_x.bias [9]\n"
            "mamba.norm.weight [9]\n"
            "mamba.a_log [1]\n"
            "mamba.d [1]\n"
            "mamba.dt_bias [1]\n");
  EXPECT_EQ(Find(table, "layers.0.attention.q.weight").parts[0], (std::pair<int64_t, int64_t>{30, 36}));
  EXPECT_EQ(Find(table, "layers.0.attention.o.weight").axis, 1);
}

// Matrices of one product are neighbours, whatever the number of ranks and whatever stands beside them.
TEST(Shards, MatricesOfOneProductAreNeighbours) {
  std::vector<BranchSpec> all;
  for (const BranchKind kind : kKinds) all.push_back({.kind = kind});
  ModelSpec spec = EveryKind({{.branches = all}});
  spec.d_ff = 24, spec.lightning.heads = spec.based.heads = spec.delta.heads = 8;
  const std::vector<std::vector<std::string>> products = {
      {"attention.k", "attention.v"},
      {"mlp.gate", "mlp.up"},
      {"mamba.b", "mamba.c", "mamba.x", "mamba.z", "mamba.dt"},
      {"lightning.q", "lightning.k", "lightning.v", "lightning.gate"},
      {"based.q", "based.k", "based.v"},
      {"delta.q", "delta.k", "delta.v", "delta.gate", "delta.beta", "delta.decay"},
      {"latent.kv_down", "latent.k_rope"}};
  for (const int ranks : {1, 2, 4, 8}) {
    const ParamStore params(Device{}, DType::kF32, BuildParamTable(spec, {ranks - 1, ranks}), 1);
    const ParamTable& table = params.table();
    for (const std::vector<std::string>& names : products) {
      int64_t rows = 0;
      const int first = table.IndexOf("layers.0." + names.front() + ".weight");
      for (size_t i = 0; i < names.size(); ++i) {
        EXPECT_EQ(table.IndexOf("layers.0." + names[i] + ".weight"), first + static_cast<int>(i)) << names[i];
        rows += Find(table, "layers.0." + names[i] + ".weight").shape[0];
      }
      const TensorRef all_rows = params.Values(first, first + static_cast<int>(names.size()) - 1);
      EXPECT_EQ(all_rows.shape(), (Shape{rows, 16})) << names.front();
    }
  }
}

// The runs of any range are those of the whole, cut.
TEST(LogicalRuns, OfARangeAreThoseOfTheWholeCut) {
  ParamInfo info{.name = "w", .shape = {3, 5}, .logical = {3, 11}, .axis = 1, .parts = {{1, 3}, {6, 9}}};
  const std::vector<int64_t> columns = {1, 2, 6, 7, 8};
  for (int64_t begin = 0; begin <= 15; ++begin) {
    for (int64_t end = begin; end <= 15; ++end) {
      std::vector<int64_t> expected, got;
      for (int64_t i = begin; i < end; ++i)
        expected.push_back(i / 5 * 11 + columns[static_cast<size_t>(i % 5)]);
      int64_t local = begin;
      for (const LogicalRun& run : LogicalRuns(info, begin, end)) {
        EXPECT_EQ(run.local, local);
        for (int64_t i = 0; i < run.elements; ++i) got.push_back(run.logical + i);
        local += run.elements;
      }
      EXPECT_EQ(got, expected);
    }
  }
}

TEST(LogicalRuns, AreAsLongAsTheyCanBe) {
  const ParamInfo rows{.name = "w", .shape = {4, 5}, .logical = {9, 5}, .axis = 0, .parts = {{2, 4}, {4, 6}}};
  const std::vector<LogicalRun> joined = LogicalRuns(rows, 3, 18);
  ASSERT_EQ(joined.size(), 1u);
  EXPECT_EQ(joined[0].local, 3);
  EXPECT_EQ(joined[0].logical, 13);
  EXPECT_EQ(joined[0].elements, 15);
  const ParamInfo whole{.name = "w", .shape = {4, 5}, .logical = {4, 5}, .axis = 1, .parts = {{0, 5}}};
  EXPECT_EQ(LogicalRuns(whole, 0, 20).size(), 1u);
  const ParamInfo nothing{.name = "w", .shape = {0, 5}, .logical = {4, 5}, .axis = 0, .parts = {{0, 0}}};
  EXPECT_TRUE(LogicalRuns(nothing, 0, 0).empty());
}

}  // namespace
}  // namespace annulus::testing
