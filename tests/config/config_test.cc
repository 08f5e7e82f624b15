// What a good configuration becomes: values, defaults, what is derived, the resolved text, overrides.

#include "annulus/train/config.h"

#include "absl/strings/match.h"
#include "sample_config.h"

namespace annulus {
namespace {

RunSpec SpecOf(const std::string& text, const std::vector<std::string>& overrides = {}) {
  const auto config = Load(text, overrides);
  EXPECT_TRUE(config.ok()) << config.status();
  return config.ok() ? config->spec : RunSpec{};
}

constexpr char kEveryField[] = R"(
name: "all" seed: 18446744073709551615
compute: F64 recompute: BLOCK nan_policy: SKIP runs_dir: "/tmp/r"
model {
  pattern: "A{w=4} - A{rope=none} -" d_model: 48
  vocab_size: 300 norm_eps: 1e-6 init_stddev: 0.01 tied_head: false
  attention { heads: 6 kv_heads: 3 head_dim: 10 window: 7 rope_theta: 5e5 rotary_dim: 4 }
  mlp { d_ff: 100 }
}
data {
  train { text { path: "a\"\\ .txt" document_separator: "\n\n\xff\x00" } weight: 0.25 }
  train { megatron { prefix: "p" } }
  train { llmc { path: "l.bin" document_start_token: 299 } weight: 3 }
  validation { text { path: "v" } }
  seq_len: 33 document_mask: true packing: DOCUMENTS
}
parallel { dp: 2 cp: 3 tp: 1 layout: STRIPED exchange {
  plan: TOKEN_RING transport: HOST direction: TOWARD_HIGHER parts: 2 buffers: 3
  output_width: COMPUTE throttle_gb_per_second: 2.5 buffer_gib: 0.5 profile: "m.textproto"
  forward { plan: BALANCED direction: FEWEST_ROWS head_split: 3 parts: 0 }
  backward { plan: DOUBLE_RING direction: FEWEST_ROWS inner: 3 parts: 1 buffers: 2 output_width: ACCUMULATOR }
} }
optim {
  adamw { lr: 0.1 beta1: 0.8 beta2: 0.7 eps: 1e-9 weight_decay: 0 }
  schedule { warmup_stable_decay { warmup_steps: 3 decay_steps: 4 final_ratio: 0.5 } }
  clip_norm: 0 steps: 9 sequences_per_step: 12 micro_batch: 3
}
checkpoint { every_steps: 5 keep: 7 on_signal: SIGUSR1 }
eval { every_steps: 2 sequences: 6 }
sample { prompt: "a\tb" tokens: 10 temperature: 0.123456789012345678 }
device: CPU deterministic: true step_deadline_seconds: 7.5 attention_kernel: CUDA_MMA
)";

TEST(Config, EveryFieldReachesTheSpec) {
  const RunSpec spec = SpecOf(kEveryField);
  RunSpec want;
  want.name = "all";
  want.seed = 18446744073709551615u;
  want.compute = ComputeType::kF64;
  want.device = DeviceChoice::kCpu;
  want.deterministic = true;
  want.attention_kernel = AttentionChoice::kTensorCore;
  want.step_deadline_seconds = 7.5;
  want.recompute = Recompute::kBlock;
  want.nan_policy = NanPolicy::kSkip;
  want.runs_dir = "/tmp/r";
  want.pattern = "A{w=4} - A{rope=none} -";
  const LayerSpec mlp{.branches = {{.kind = BranchKind::kMlp}}};
  want.model = {
      .d_model = 48,
      .vocab_size = 300,
      .heads = 6,
      .kv_heads = 3,
      .head_dim = 10,
      .rotary_dim = 4,
      .d_ff = 100,
      .norm_eps = 1e-6,
      .init_stddev = 0.01,
      .tied_head = false,
      .layers = {{.branches = {{.window = 4, .rope_theta = 5e5}}}, mlp, {.branches = {{.window = 7}}}, mlp}};
  want.data.train = {{SourceFormat::kText, "a\"\\ .txt", 0.25, std::string("\n\n\xff\0", 4), -1},
                     {SourceFormat::kMegatron, "p", 1.0, "", -1},
                     {SourceFormat::kLlmC, "l.bin", 3.0, "", 299}};
  want.data.validation = {{SourceFormat::kText, "v", 1.0, "", -1}};
  want.data.seq_len = 33;
  want.data.document_mask = true;
  want.data.packing = Packing::kDocuments;
  want.parallel = {2, 3, 1, LayoutKind::kStriped, {}};
  const PassPlanSpec ring{.plan = PlanName::kTokenRing,
                          .direction = RingDirection::kTowardHigher,
                          .parts = 2,
                          .buffers = 3,
                          .output_width = Width::kCompute};
  // What a pass leaves away is that of both.
  const PassPlanSpec forward{
      .plan = PlanName::kBalanced, .head_split = 3, .buffers = 3, .output_width = Width::kCompute};
  const PassPlanSpec backward{.plan = PlanName::kDoubleRing, .inner = 3, .parts = 1, .buffers = 2};
  want.parallel.exchange = {ring, forward, backward,      TransportChoice::kHost,
                            2.5,  0.5,     "m.textproto", LatentExchange::kAuto};
  want.optim = {0.1, 0.8, 0.7, 1e-9, 0.0, 0.0, {ScheduleKind::kWarmupStableDecay, 3, 4, 0.5}, 9, 12, 3};
  want.checkpoint = {5, 7};
  want.eval = {2, 6};
  want.sample = {"a\tb", 10, 0.123456789012345678};
  EXPECT_TRUE(spec == want) << Load(kEveryField)->text;
}

constexpr char kEveryBranch[] = R"(
name: "hybrid"
model {
  pattern: "meta=5 (A+M{combine=mean-norm} -)^2 T{g=2} T{rope=none} L B G -" d_model: 48
  attention { heads: 6 rope: NONE }
  mlp { d_ff: 100 activation: RELU_SQUARED }
  latent { heads: 2 q_rank: 9 kv_rank: 12 nope_dim: 5 rope_dim: 4 v_dim: 7 rope_theta: 2e4 }
  mamba { heads: 8 head_dim: 3 state: 11 groups: 4 conv: 3 chunk: 32 dt_min: 0.001 dt_max: 0.5 }
  lightning { heads: 2 key_dim: 5 value_dim: 9 chunk: 33 }
  based { heads: 6 key_dim: 4 value_dim: 8 chunk: 34 }
  delta { heads: 4 key_dim: 6 value_dim: 7 chunk: 35 conv: 0 }
  rope_scaling { yarn {
    factor: 40 original_length: 4096 beta_fast: 31 beta_slow: 2 mscale: 0.5 mscale_all_dim: 0.25 } }
}
data { train { text { path: "t" } } seq_len: 32 }
parallel { tp: 2 cp: 2 exchange { latent: EXPANDED } }
optim { adamw { lr: 0.1 } steps: 9 sequences_per_step: 12 }
)";

TEST(Config, RecallReachesTheSpecAndTheResolvedText) {
  const auto config = Load(Changed("train { text { path: \"a.txt\" } }", R"(recall {
    task { length: 64 pairs: 4 } task { length: 32 pairs: 8 } validation_task { length: 60 pairs: 15 }
    train_sequences: 50 validation_sequences: 6 })"),
                           {"model.vocab_size=40", "eval.accuracy=true"});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_TRUE(config->spec.data.recall == (RecallSpec{{{64, 4}, {32, 8}}, {{60, 15}}, 50, 6}));
  EXPECT_TRUE(config->spec.data.train.empty());
  EXPECT_TRUE(config->spec.eval.accuracy);
  EXPECT_TRUE(SpecOf(config->text) == config->spec) << config->text;
  const RunSpec without = SpecOf(kSampleConfig);
  EXPECT_FALSE(without.data.recall.has_value() || without.eval.accuracy);
}

TEST(Config, EveryBranchReachesTheSpec) {
  ModelSpec want{.d_model = 48, .vocab_size = 256, .heads = 6, .kv_heads = 6, .head_dim = 8, .d_ff = 100};
  want.activation = Activation::kReluSquared;
  want.rope_scaling = {.kind = RopeScalingKind::kYarn,
                       .factor = 40,
                       .original_length = 4096,
                       .beta_fast = 31,
                       .beta_slow = 2,
                       .mscale = 0.5,
                       .mscale_all_dim = 0.25};
  want.latent = {.heads = 2, .q_rank = 9, .kv_rank = 12, .nope_dim = 5, .rope_dim = 4, .v_dim = 7};
  want.mamba = {.heads = 8,
                .head_dim = 3,
                .state = 11,
                .groups = 4,
                .conv = 3,
                .chunk = 32,
                .dt_min = 0.001,
                .dt_max = 0.5};
  want.lightning = {.heads = 2, .key_dim = 5, .value_dim = 9, .chunk = 33};
  want.based = {.heads = 6, .key_dim = 4, .value_dim = 8, .chunk = 34};
  want.delta = {.heads = 4, .key_dim = 6, .value_dim = 7, .conv = 0, .chunk = 35};
  want.meta_tokens = 5;
  const LayerSpec mlp{.branches = {{.kind = BranchKind::kMlp}}};
  const LayerSpec both{.branches = {{.kind = BranchKind::kAttention}, {.kind = BranchKind::kMamba}},
                       .combine = Combine::kMeanNorm};
  want.layers = {both, mlp, both, mlp};
  want.layers.push_back(
      {.branches = {{.kind = BranchKind::kLatentAttention, .rope_theta = 2e4, .latent_groups = 2}}});
  for (const BranchKind kind : {BranchKind::kLatentAttention, BranchKind::kLightning, BranchKind::kBased,
                                BranchKind::kDeltaNet, BranchKind::kMlp}) {
    want.layers.push_back({.branches = {{.kind = kind}}});
  }
  const RunSpec spec = SpecOf(kEveryBranch);
  EXPECT_TRUE(spec.model == want) << Load(kEveryBranch)->text;
  EXPECT_EQ(spec.parallel.tp, 2);
  EXPECT_EQ(spec.parallel.exchange.latent, LatentExchange::kExpanded);
  const RunSpec llama3 = SpecOf(kEveryBranch, {"model.rope_scaling={llama3{factor:8 original_length:8192}}"});
  EXPECT_EQ(llama3.model.rope_scaling,
            (RopeScaling{.kind = RopeScalingKind::kLlama3, .factor = 8, .original_length = 8192}));
}

// A model without attention says nothing of it; widths of heads follow from that of the model.
TEST(Config, SectionsOfAbsentBranchesMayBeLeftAway) {
  const std::string text = R"(name: "m" model { pattern: "M L B G T" d_model: 48
    mamba { head_dim: 4 state: 8 } lightning { heads: 6 } based { heads: 4 key_dim: 16 }
    delta { heads: 2 } latent { heads: 3 kv_rank: 16 nope_dim: 8 rope_dim: 4 } }
    data { train { text { path: "t" } } seq_len: 32 }
    optim { adamw { lr: 0.1 } steps: 9 sequences_per_step: 12 })";
  ModelSpec want{.d_model = 48, .vocab_size = 256};
  want.latent = {.heads = 3, .kv_rank = 16, .nope_dim = 8, .rope_dim = 4, .v_dim = 8};
  want.mamba = {.heads = 24, .head_dim = 4, .state = 8};
  want.lightning = {.heads = 6, .key_dim = 8, .value_dim = 8};
  want.based = {.heads = 4, .key_dim = 16, .value_dim = 12};
  want.delta = {.heads = 2, .key_dim = 24, .value_dim = 24};
  want.layers = ParsePattern("M L B G T", {})->layers;
  EXPECT_TRUE(SpecOf(text).model == want) << Load(text)->text;
  const std::string resolved = Load(text)->text;
  EXPECT_FALSE(absl::StrContains(resolved, "attention {")) << resolved;
  EXPECT_FALSE(absl::StrContains(resolved, "mlp {")) << resolved;
  EXPECT_FALSE(absl::StrContains(resolved, "rope_scaling {")) << resolved;
  EXPECT_TRUE(absl::StrContains(resolved, "\n    heads: 24  # derived: 2 * model.d_model / head_dim\n"));
}

TEST(Config, DefaultsAreThoseOfTheSpec) {
  const RunSpec spec = SpecOf(kSampleConfig);
  RunSpec want;
  want.name = "small";
  want.pattern = "(A -)^2";
  want.model.d_model = 64;
  want.model.vocab_size = 256;  // derived
  want.model.heads = 4;
  want.model.kv_heads = 2;
  want.model.head_dim = 16;  // derived
  want.model.d_ff = 128;
  want.model.layers = ParsePattern("(A -)^2", {})->layers;
  want.data.train = {{SourceFormat::kText, "a.txt", 1.0, "", -1}};
  want.data.seq_len = 64;
  want.parallel.dp = 0;  // no number of ranks was given
  want.optim.lr = 1e-3;
  want.optim.steps = 100;
  want.optim.sequences_per_step = 8;
  EXPECT_TRUE(spec == want) << Load(kSampleConfig)->text;
}

TEST(Config, DerivesWhatIsLeftAway) {
  EXPECT_EQ(SpecOf(Changed(" kv_heads: 2", "")).model.kv_heads, 4);
  EXPECT_EQ(SpecOf(Changed("sequences_per_step: 8", "tokens_per_step: 640")).optim.sequences_per_step, 10);
  const auto on_four = Load(Changed("optim {", "parallel { cp: 2 }\noptim {"), {}, 4);
  ASSERT_TRUE(on_four.ok()) << on_four.status();
  EXPECT_EQ(on_four->spec.parallel.dp, 2);
  const RunSpec no_rope = SpecOf(Changed("kv_heads: 2", "kv_heads: 2 rope: NONE"));
  EXPECT_FALSE(no_rope.model.layers[0].branches[0].rope_theta.has_value());
  EXPECT_EQ(SpecOf(Changed("steps: 100", "steps: 100 schedule { constant {} }")).optim.schedule.kind,
            ScheduleKind::kConstant);
}

TEST(Config, ResolvedTextNamesEverySource) {
  const auto config = Load(Changed("sequences_per_step: 8", "tokens_per_step: 640"),
                           {"optim.adamw.beta1=0.5", "data.train[0].text={path:\"b\"}"}, 2);
  ASSERT_TRUE(config.ok()) << config.status();
  for (const char* line :
       {"\nname: \"small\"  # c.textproto:1\n", "\nseed: 0  # default\n", "\n    heads: 4  # c.textproto:5\n",
        "\n    head_dim: 16  # derived: model.d_model / heads\n",
        "\n  vocab_size: 256  # derived: text is read as bytes\n", "\n    lr: 0.001  # c.textproto:13\n",
        "\n    beta1: 0.5  # --set\n", "\n      path: \"b\"  # --set\n",
        "\n  dp: 2  # derived: 2 ranks / (cp * tp)\n",
        "\n  # sequences_per_step: 10 (derived: tokens_per_step / data.seq_len)\n",
        "\n  on_signal: SIGUSR1  # default\n"}) {
    EXPECT_TRUE(absl::StrContains(config->text, line)) << line << "in\n" << config->text;
  }
  EXPECT_TRUE(absl::StrContains(Load(kSampleConfig)->text, "\n  # dp: the number of ranks / (cp * tp)\n"));
}

TEST(Config, ResolvedTextLoadsAsTheSameSpec) {
  for (const std::string& text :
       {std::string(kSampleConfig), std::string(kEveryField), std::string(kEveryBranch),
        Changed("sequences_per_step: 8", "tokens_per_step: 640"),
        Changed("kv_heads: 2", "kv_heads: 2 rope: NONE"),
        Changed("1e-3", "0.1000000000000000055511151231257827"), Changed("1e-3", "3.0000000000000004e-4")}) {
    for (const std::optional<int64_t> world : {std::optional<int64_t>(), std::optional<int64_t>(6)}) {
      const std::vector<std::string> overrides = {"optim.sequences_per_step=36", "parallel.cp=3"};
      const auto first = Load(text, overrides, world);
      ASSERT_TRUE(first.ok()) << first.status();
      const auto second = Load(first->text, {}, world);
      ASSERT_TRUE(second.ok()) << second.status() << "\n" << first->text;
      EXPECT_TRUE(first->spec == second->spec) << first->text << second->text;
    }
  }
}

TEST(Overrides, SetEveryKindOfField) {
  const RunSpec spec =
      SpecOf(kSampleConfig,
             {"name=other", "seed=7", "compute=F64", "optim.adamw.lr=3e-4", "optim.steps= 50 ",
              "model.tied_head=false", "data.train[0].text.path=dir/b c.txt",
              "parallel.exchange.plan=KV_RING", "parallel.exchange.backward.plan=TOKEN_RING",
              "data.train[0].text.document_separator=\n\n", "data.train[1].megatron.prefix=p",
              "data.train[1].weight=2", "model.vocab_size=999", "optim.schedule={constant{warmup_steps:5}}",
              "optim.tokens_per_step=128", "optim.clip_norm=0.5", "optim.clip_norm=2"});
  EXPECT_EQ(spec.name, "other");
  EXPECT_EQ(spec.seed, 7u);
  EXPECT_EQ(spec.compute, ComputeType::kF64);
  EXPECT_EQ(spec.optim.lr, 3e-4);
  EXPECT_EQ(spec.optim.steps, 50);
  EXPECT_FALSE(spec.model.tied_head);
  EXPECT_EQ(spec.parallel.exchange.both.plan, PlanName::kKvRing);
  EXPECT_EQ(spec.parallel.exchange.Of(Pass::kForward).plan, PlanName::kKvRing);
  EXPECT_EQ(spec.parallel.exchange.Of(Pass::kBackward).plan, PlanName::kTokenRing);
  const std::vector<SourceSpec> sources = {{SourceFormat::kText, "dir/b c.txt", 1.0, "\n\n", -1},
                                           {SourceFormat::kMegatron, "p", 2.0, "", -1}};
  EXPECT_EQ(spec.data.train, sources);
  EXPECT_EQ(spec.optim.schedule, (ScheduleSpec{ScheduleKind::kConstant, 5, 0, 0.1}));
  EXPECT_EQ(spec.optim.sequences_per_step, 2);  // tokens_per_step took the place of sequences_per_step
  EXPECT_EQ(spec.optim.clip_norm, 2.0);         // the last one wins
}

TEST(Overrides, CanMendTheText) {
  EXPECT_EQ(SpecOf(Changed("lr: 1e-3", "lr: -1"), {"optim.adamw.lr=1"}).optim.lr, 1.0);
  EXPECT_EQ(SpecOf(Changed("seq_len: 64", ""), {"data.seq_len=8"}).data.seq_len, 8);
  // Another kind of source takes the place of the old one.
  EXPECT_EQ(SpecOf(kSampleConfig, {"data.train[0].llmc.path=x", "model.vocab_size=9"}).data.train[0].format,
            SourceFormat::kLlmC);
}

}  // namespace
}  // namespace annulus
