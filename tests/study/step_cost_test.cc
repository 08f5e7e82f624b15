// Costs of steps. Profiles of which only one rate is finite turn seconds into what was counted: FLOPs, bytes,
// calls.

#include "annulus/study/step_cost.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "annulus/base/file.h"

namespace annulus {
namespace {

constexpr double kFast = 1e30;   // per second: takes no time
constexpr double kFlops = 1e12;  // per second

ModelSpec DenseModel() {
  ModelSpec model{.d_model = 64,
                  .vocab_size = 256,
                  .heads = 4,
                  .kv_heads = 2,
                  .head_dim = 16,
                  .d_ff = 176,
                  .tied_head = false};
  model.layers = {{.branches = {{.kind = BranchKind::kAttention, .rope_theta = 1e4}}},
                  {.branches = {{.kind = BranchKind::kMlp}}}};
  return model;
}

RunSpec RunOf(ModelSpec model) {
  RunSpec spec;
  spec.compute = ComputeType::kF32;
  spec.device = DeviceChoice::kCpu;
  spec.model = std::move(model);
  spec.recompute = Recompute::kNone;
  spec.data.seq_len = 512;
  spec.optim.sequences_per_step = 4;
  spec.optim.micro_batch = 2;
  return spec;
}

// Every product at kFlops, attention and scans at kFlops of what the model counts of them; nothing else takes
// time.
MachineProfile FlopsAlone(const ModelSpec& model) {
  MachineProfile machine{.device = "test",
                         .ranks = 4,
                         .attention = {},
                         .links = {{TransportKind::kHost, {{1, kFast}}, {{1, kFast}}, 0, 1}},
                         .copy = {{1, kFast}},
                         .products = {{1, kFlops}},
                         .product_gradients = {{1, kFlops}}};
  const LatentSpec& latent = model.latent;
  const int64_t dim = latent.heads > 0 ? latent.nope_dim + latent.rope_dim : model.head_dim;
  const int64_t v_dim = latent.heads > 0 ? latent.v_dim : model.head_dim;
  const MambaSpec& mamba = model.mamba;
  const auto updates = static_cast<double>(mamba.heads * mamba.state * mamba.head_dim);
  const double scan_flops =
      4 * updates +
      static_cast<double>(mamba.chunk * (mamba.groups * mamba.state + mamba.heads * mamba.head_dim));
  for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
    const double times = pass == Pass::kForward ? 1 : 2;
    machine.attention.push_back({.kernel = AttentionKernel::kCpuTiles,
                                 .pass = pass,
                                 .shape = MaskShape::kGeneral,
                                 .head_dim = dim,
                                 .v_head_dim = v_dim,
                                 .pairs = {{1, kFlops / (times * 2 * static_cast<double>(dim + v_dim))}}});
    machine.scans.push_back({.kernel = ScanKernel::kSsd,
                             .pass = pass,
                             .updates = {{1, kFlops * updates / (times * scan_flops)}}});
  }
  return machine;
}

double SecondsOf(const StepCost& cost, const std::vector<Stage>& stages) {
  double seconds = 0;
  for (const Stage& stage : stages) {
    seconds += stage.kind == StageKind::kExchange
                   ? cost.exchanges[static_cast<size_t>(stage.exchange)].seconds[0]
                   : stage.seconds;
  }
  return seconds;
}
// Of all micro-batches.
double ComputingOf(const StepCost& cost) {
  double seconds = 0;
  for (const LayerCost& layer : cost.layers)
    seconds += SecondsOf(cost, layer.forward) + SecondsOf(cost, layer.backward);
  return seconds * static_cast<double>(cost.micro_batches);
}

StepCost CostOf(const RunSpec& spec, const MachineProfile& machine) {
  absl::StatusOr<StepCost> cost = CostOfStep(spec, machine);
  EXPECT_TRUE(cost.ok()) << cost.status();
  return *std::move(cost);
}
double CountedFlops(const RunSpec& spec) {
  return ComputingOf(CostOf(spec, FlopsAlone(spec.model))) * kFlops;
}
double ModelFlops(const RunSpec& spec) {
  return TrainingFlops(spec.model, spec.data.seq_len).causal *
         static_cast<double>(spec.data.seq_len * spec.optim.sequences_per_step);
}

TEST(StepCostTest, DenseStagesAddUpToTheFlopsOfTheModel) {
  const RunSpec spec = RunOf(DenseModel());
  EXPECT_NEAR(CountedFlops(spec) / ModelFlops(spec), 1, 1e-12);
}

ModelSpec MambaModel() {
  ModelSpec model = DenseModel();
  model.mamba = {.heads = 8, .head_dim = 16, .state = 32, .groups = 2, .chunk = 64};
  model.layers[0].branches[0] = {.kind = BranchKind::kMamba};
  return model;
}

// What the model counts of the convolutions is a pass over memory here.
double ConvolutionFlops(const RunSpec& spec) {
  const MambaSpec& mamba = spec.model.mamba;
  const int64_t channels = mamba.heads * mamba.head_dim + 2 * mamba.groups * mamba.state;
  return 6.0 * static_cast<double>(spec.data.seq_len * spec.optim.sequences_per_step * channels * mamba.conv);
}

TEST(StepCostTest, HybridStagesAddUpToTheFlopsOfTheModel) {
  const RunSpec spec = RunOf(MambaModel());
  EXPECT_NEAR((CountedFlops(spec) + ConvolutionFlops(spec)) / ModelFlops(spec), 1, 1e-12);
}

TEST(StepCostTest, BranchesSideBySideAddUpToTheFlopsOfTheModel) {
  RunSpec spec = RunOf(MambaModel());
  spec.model.layers[0].branches.push_back({.kind = BranchKind::kAttention});
  for (const Combine combine : {Combine::kSum, Combine::kMeanNorm}) {
    spec.model.layers[0].combine = combine;
    EXPECT_NEAR((CountedFlops(spec) + ConvolutionFlops(spec)) / ModelFlops(spec), 1, 1e-12);
  }
}

// Latents are expanded anew in backward, whatever is kept.
TEST(StepCostTest, LatentStagesAddUpToTheFlopsOfTheModelAndAnExpansion) {
  RunSpec spec = RunOf(DenseModel());
  spec.model.latent = {.heads = 4, .q_rank = 24, .kv_rank = 32, .nope_dim = 16, .rope_dim = 8, .v_dim = 16};
  spec.model.layers[0].branches[0] = {
      .kind = BranchKind::kLatentAttention, .rope_theta = 1e4, .latent_groups = 2};
  const double tokens = 4 * 512, expansions = tokens * 2 * 2 * (4 * (16 + 16)) * 16;
  EXPECT_NEAR(CountedFlops(spec) / (ModelFlops(spec) + expansions), 1, 1e-12);
}

// A line of 32 bytes is a document, and its line end belongs to it: of 512 tokens each sees those before it
// in its own.
TEST(StepCostTest, DocumentsArePricedAsInTheData) {
  const std::string path = ::testing::TempDir() + "step_cost_documents.txt";
  std::string text;
  while (text.size() < 1 << 16) absl::StrAppend(&text, std::string(31, 'a'), "\n");
  ASSERT_TRUE(WriteFileAtomically(path, text).ok());
  RunSpec spec = RunOf(DenseModel());
  spec.data.train = {{.path = path, .document_separator = "\n"}};
  const MachineProfile machine = FlopsAlone(spec.model);
  const auto cost = [&](Documents documents) {
    return CostOfStep(spec, machine, PlanEffort::kAll, documents).value();
  };
  const auto seconds = [](const StepCost& of) { return of.exchanges[1].seconds[0]; };
  EXPECT_EQ(cost(Documents::kAsInData).documents, "");
  const double whole = seconds(cost(Documents::kWhole));
  EXPECT_EQ(seconds(cost(Documents::kAsInData)), whole) << "not masked";

  spec.data.document_mask = true;
  const StepCost masked = cost(Documents::kAsInData);
  // 16 or so documents, the first and last of which a sequence may cut.
  const double share = seconds(masked) / whole, even = (16 * 32 * 33 / 2) / (512 * 513 / 2.0);
  EXPECT_GT(share, 0.94 * even);
  EXPECT_LT(share, 1.06 * even);
  EXPECT_EQ(masked.documents,
            absl::StrFormat("documents as in the data: %.1f%% of the pairs of whole sequences", 100 * share));
  EXPECT_EQ(seconds(cost(Documents::kWhole)), whole);

  ASSERT_TRUE(RemoveAll(path).ok());
  const StepCost absent = cost(Documents::kAsInData);
  EXPECT_EQ(seconds(absent), whole);
  EXPECT_TRUE(absl::StartsWith(absent.documents, "documents priced as whole sequences: "))
      << absent.documents;
  EXPECT_TRUE(absl::StrContains(absent.documents, path)) << absent.documents;
}

TEST(StepCostTest, RatesThatAreNotKnownAreNamed) {
  const RunSpec spec = RunOf(MambaModel());
  MachineProfile machine = FlopsAlone(spec.model);
  machine.scans.pop_back();
  EXPECT_EQ(
      CostOfStep(spec, machine).status().message(),
      "machine profile of test: no scan { kernel: SSD pass: BACKWARD }: expected a profile that annulus "
      "calibrate wrote, or one with assumed rates");
  RunSpec dense = RunOf(DenseModel());
  machine.attention.pop_back();
  EXPECT_EQ(CostOfStep(dense, machine).status().message(),
            "machine profile of test: expected rates of attention of both passes");
  machine = FlopsAlone(dense.model);
  machine.links.clear();
  dense.parallel.cp = 2;
  EXPECT_EQ(CostOfStep(dense, machine).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(StepCostTest, OneLayerByHand) {
  RunSpec spec = RunOf(DenseModel());
  spec.model.layers = {{.branches = {{.kind = BranchKind::kMlp}}}};
  spec.optim.sequences_per_step = spec.optim.micro_batch = 1;
  const StepCost cost = CostOf(spec, FlopsAlone(spec.model));
  ASSERT_EQ(cost.layers.size(), 3);  // embedding, MLP, head
  EXPECT_EQ(cost.micro_batches, 1);
  EXPECT_EQ(cost.layers[1].name, "layer 0: mlp");
  const double forward = 2.0 * 512 * 3 * 64 * 176;
  EXPECT_NEAR(SecondsOf(cost, cost.layers[1].forward) * kFlops, forward, 1);
  EXPECT_NEAR(SecondsOf(cost, cost.layers[1].backward) * kFlops, 2 * forward, 1);
  // Buckets: embedding, the layer (its norm, gate, up, down), final norm with the head; all in f32.
  ASSERT_EQ(cost.buckets.size(), 3);
  EXPECT_EQ(cost.buckets[1].gradient_bytes, 4 * (64 + 3 * 64 * 176));
  EXPECT_EQ(cost.buckets[2].parameter_bytes, 4 * (64 + 256 * 64));
}

TEST(StepCostTest, PassesOverMemoryByHand) {
  RunSpec spec = RunOf(DenseModel());
  spec.model.layers = {{.branches = {{.kind = BranchKind::kMlp}}}};
  spec.optim.sequences_per_step = spec.optim.micro_batch = 1;
  MachineProfile machine = FlopsAlone(spec.model);
  machine.products = machine.product_gradients = {{1, kFast}};
  machine.copy = {{1, 1.0}};  // seconds are bytes
  const StepCost cost = CostOf(spec, machine);
  const double stream = 512 * 64 * 4, inner = 512 * 176 * 4;
  // Norm and residual stream read and written; gate and up read, their product written.
  EXPECT_NEAR(SecondsOf(cost, cost.layers[1].forward), 4 * stream + 3 * inner, 1);
  // Gate, up and the gradient of their product read, two gradients written; the norm's gradient.
  EXPECT_NEAR(SecondsOf(cost, cost.layers[1].backward), 5 * inner + 4 * stream, 1);
}

TEST(StepCostTest, LongerSequencesCostMore) {
  RunSpec spec = RunOf(DenseModel());
  double last = 0;
  for (spec.data.seq_len = 256; spec.data.seq_len <= 4096; spec.data.seq_len *= 2) {
    const double flops = CountedFlops(spec);
    EXPECT_GT(flops, 2 * last);  // twice the tokens, and more keys for each
    last = flops;
  }
}

TEST(StepCostTest, TensorParallelRanksHalveProductsAndSendTokens) {
  RunSpec spec = RunOf(DenseModel());
  const double alone = CountedFlops(spec);
  spec.parallel.tp = 2;
  EXPECT_NEAR(CountedFlops(spec) / alone, 0.5, 1e-12);
  const StepCost cost = CostOf(spec, FlopsAlone(spec.model));
  const std::vector<Stage>& forward = cost.layers[1].forward;
  EXPECT_EQ(std::count_if(forward.begin(), forward.end(),
                          [](const Stage& stage) { return stage.kind == StageKind::kTensorGather; }),
            1);
  ASSERT_EQ(forward.back().kind, StageKind::kTensorScatter);
  EXPECT_EQ(forward.back().bytes, 2 * 512 * 64 * 4 / 2);  // half of the sums
}

// Norms are on all ranks of a tensor-parallel group: their gradients are sums of what each has.
TEST(StepCostTest, BucketsKnowWhatTensorParallelRanksShare) {
  RunSpec spec = RunOf(DenseModel());
  const MachineProfile machine = FlopsAlone(spec.model);
  const auto replicated = [&] {
    std::vector<int64_t> bytes;
    const StepCost cost = CostOfStep(spec, machine).value();
    for (const BucketCost& bucket : cost.buckets) bytes.push_back(bucket.replicated_bytes);
    return bytes;
  };
  for (const int64_t bytes : replicated()) EXPECT_EQ(bytes, 0);
  spec.parallel.tp = 2;
  const std::vector<int64_t> shared = replicated();
  ASSERT_EQ(shared.size(), 4u) << "embedding, two layers, head";
  for (const size_t norm : {1u, 2u, 3u}) EXPECT_EQ(shared[norm], 64 * 4) << "one of d_model, bucket " << norm;
  EXPECT_EQ(shared[0], 0);
}

TEST(StepCostTest, RecomputationAdds) {
  RunSpec spec = RunOf(DenseModel());
  const double none = CountedFlops(spec);
  const double tokens = 4 * 512;
  spec.recompute = Recompute::kElementwise;
  EXPECT_NEAR(CountedFlops(spec), none, 1);
  spec.recompute = Recompute::kAttentionOutput;
  const double products = 2 * tokens * 64 * ((4 + 2 * 2) * 16 + 2 * 176);
  EXPECT_NEAR(CountedFlops(spec) - none, products, 1e-9 * none);
  spec.recompute = Recompute::kBlock;
  const double attention = 4.0 * 4 * 16 * tokens * MeanVisibleKeys(512, 0);
  EXPECT_NEAR(CountedFlops(spec) - none, products + attention, 1e-9 * none);
}

TEST(StepCostTest, RanksOfASequenceShareItsWork) {
  RunSpec spec = RunOf(DenseModel());
  const double alone = CountedFlops(spec);
  spec.parallel.cp = 2;
  const StepCost cost = CostOf(spec, FlopsAlone(spec.model));
  EXPECT_NEAR(ComputingOf(cost) * kFlops / alone, 0.5, 1e-9);
  ASSERT_EQ(cost.exchanges.size(), 2);  // forward, backward
  EXPECT_EQ(cost.exchanges[0].seconds.size(), 2);
  ASSERT_FALSE(cost.exchanges[0].sent.empty());
  EXPECT_GT(cost.exchanges[0].sent[0].bytes, 0);
}

// Links take time, computing none.
MachineProfile LinksAlone(double inside, double between, int ranks_per_host) {
  MachineProfile machine = FlopsAlone(DenseModel());
  machine.links = {{TransportKind::kHost, {{1, inside}}, {{1, inside}}, 0, 1}};
  machine.network = {.ranks_per_host = ranks_per_host,
                     .links = {{TransportKind::kHost, {{1, between}}, {{1, between}}, 0, 1}}};
  return machine;
}
double ExchangeSeconds(const RunSpec& spec, const MachineProfile& machine) {
  return CostOf(spec, machine).exchanges[0].seconds[0];
}

TEST(StepCostTest, MessagesBetweenHostsTakeTheirLinks) {
  RunSpec spec = RunOf(DenseModel());
  spec.parallel.cp = 4;
  spec.parallel.exchange.both.plan = PlanName::kKvRing;
  const double one_host = ExchangeSeconds(spec, LinksAlone(1e9, 1e6, 0));
  EXPECT_EQ(ExchangeSeconds(spec, LinksAlone(1e9, 1e6, 4)), one_host);
  // Most of a ring's way is as slow as its slowest link.
  const double two_hosts = ExchangeSeconds(spec, LinksAlone(1e9, 1e6, 2));
  const double all_slow = ExchangeSeconds(spec, LinksAlone(1e6, 1e6, 0));
  EXPECT_LT(two_hosts, all_slow);
  EXPECT_GT(two_hosts, all_slow / 2);
  EXPECT_GT(all_slow, 900 * one_host);
  // Cards that the ranks of a host share are narrower.
  MachineProfile shared = LinksAlone(1e9, 1e6, 2);
  shared.network.host_bytes_per_second = 5e5;
  EXPECT_NEAR(ExchangeSeconds(spec, shared) / two_hosts, 2, 0.01);

  MachineProfile unknown = LinksAlone(1e9, 1e6, 2);
  unknown.network.links.clear();
  EXPECT_NE(CostOfStep(spec, unknown)
                .status()
                .message()
                .find("no rates of messages between hosts by host: expected network { link { ... } } of it"),
            absl::string_view::npos)
      << CostOfStep(spec, unknown).status();
}

// Tensor-parallel ranks stand between those of a sequence.
TEST(StepCostTest, RanksThatAreAloneOnTheirHostsNeedNoLinksInside) {
  RunSpec spec = RunOf(DenseModel());
  spec.parallel.cp = 2;
  MachineProfile machine = FlopsAlone(spec.model);
  machine.network = {.ranks_per_host = 1, .links = std::move(machine.links)};
  machine.links.clear();
  const auto cost = CostOfStep(spec, machine);
  ASSERT_TRUE(cost.ok()) << cost.status();
  machine.network.ranks_per_host = 2;
  EXPECT_FALSE(CostOfStep(spec, machine).ok()) << "both are on one host, whose links are not known";
}

TEST(StepCostTest, RanksOfASequenceAreTensorRanksApart) {
  RunSpec spec = RunOf(DenseModel());
  spec.parallel.cp = spec.parallel.tp = 2;
  spec.parallel.exchange.both.plan = PlanName::kKvRing;
  const double one_host = ExchangeSeconds(spec, LinksAlone(1e9, 1e6, 4));
  EXPECT_GT(ExchangeSeconds(spec, LinksAlone(1e9, 1e6, 2)), 100 * one_host);
}

TEST(StepCostTest, QuickPlansAreNearThoseOfTheSearch) {
  RunSpec spec = RunOf(DenseModel());
  spec.data.seq_len = 4096;
  spec.parallel.cp = 8;
  const MachineProfile machine = LinksAlone(1e9, 1e9, 4);
  const absl::StatusOr<StepCost> quick = CostOfStep(spec, machine, PlanEffort::kQuick);
  ASSERT_TRUE(quick.ok()) << quick.status();
  const StepCost all = CostOf(spec, machine);
  for (size_t i = 0; i < all.exchanges.size(); ++i) {
    const auto most = [](const ExchangePass& pass) {
      return *std::max_element(pass.seconds.begin(), pass.seconds.end());
    };
    EXPECT_GE(most(quick->exchanges[i]), most(all.exchanges[i]) * (1 - 0.021));
    EXPECT_LE(most(quick->exchanges[i]), most(all.exchanges[i]) * 2);
  }
}

}  // namespace
}  // namespace annulus
