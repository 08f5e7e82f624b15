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
  attention { heads: 6 kv_heads: 3 head_dim: 10 window: 7 rope_theta: 5e5 }
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
  plan: KV_RING transport: HOST direction: TOWARD_HIGHER parts: 2 buffers: 3
  output_width: COMPUTE throttle_gb_per_second: 2.5 buffer_gib: 0.5 profile: "m.textproto"
  forward { plan: ULYSSES direction: FEWEST_ROWS head_split: 3 }
  backward { plan: DOUBLE_RING direction: FEWEST_ROWS inner: 3 buffers: 2 }
} }
optim {
  adamw { lr: 0.1 beta1: 0.8 beta2: 0.7 eps: 1e-9 weight_decay: 0 }
  schedule { warmup_stable_decay { warmup_steps: 3 decay_steps: 4 final_ratio: 0.5 } }
  clip_norm: 0 steps: 9 sequences_per_step: 12 micro_batch: 3
}
checkpoint { every_steps: 5 keep: 7 on_signal: SIGUSR1 }
eval { every_steps: 2 sequences: 6 }
sample { prompt: "a\tb" tokens: 10 temperature: 0.123456789012345678 }
device: CPU deterministic: true step_deadline_seconds: 7.5
)";

TEST(Config, EveryFieldReachesTheSpec) {
  const RunSpec spec = SpecOf(kEveryField);
  RunSpec want;
  want.name = "all";
  want.seed = 18446744073709551615u;
  want.compute = ComputeType::kF64;
  want.device = DeviceChoice::kCpu;
  want.deterministic = true;
  want.step_deadline_seconds = 7.5;
  want.recompute = Recompute::kBlock;
  want.nan_policy = NanPolicy::kSkip;
  want.runs_dir = "/tmp/r";
  want.pattern = "A{w=4} - A{rope=none} -";
  const LayerSpec mlp{LayerKind::kMlp, 0, std::nullopt};
  want.model = {48, 300, 6, 3, 10, 100, 1e-6, 0.01, false, {}};
  want.model.layers = {{LayerKind::kAttention, 4, 5e5}, mlp, {LayerKind::kAttention, 7, std::nullopt}, mlp};
  want.data.train = {{SourceFormat::kText, "a\"\\ .txt", 0.25, std::string("\n\n\xff\0", 4), -1},
                     {SourceFormat::kMegatron, "p", 1.0, "", -1},
                     {SourceFormat::kLlmC, "l.bin", 3.0, "", 299}};
  want.data.validation = {{SourceFormat::kText, "v", 1.0, "", -1}};
  want.data.seq_len = 33;
  want.data.document_mask = true;
  want.data.packing = Packing::kDocuments;
  want.parallel = {2, 3, 1, LayoutKind::kStriped, {}};
  const PassPlanSpec ring{.plan = PlanName::kKvRing,
                          .direction = RingDirection::kTowardHigher,
                          .parts = 2,
                          .buffers = 3,
                          .output_width = Width::kCompute};
  // What a pass leaves away is that of both.
  const PassPlanSpec forward{
      .plan = PlanName::kUlysses, .head_split = 3, .parts = 2, .buffers = 3, .output_width = Width::kCompute};
  const PassPlanSpec backward{
      .plan = PlanName::kDoubleRing, .inner = 3, .parts = 2, .buffers = 2, .output_width = Width::kCompute};
  want.parallel.exchange = {ring, forward, backward, TransportChoice::kHost, 2.5, 0.5, "m.textproto"};
  want.optim = {0.1, 0.8, 0.7, 1e-9, 0.0, 0.0, {ScheduleKind::kWarmupStableDecay, 3, 4, 0.5}, 9, 12, 3};
  want.checkpoint = {5, 7};
  want.eval = {2, 6};
  want.sample = {"a\tb", 10, 0.123456789012345678};
  EXPECT_TRUE(spec == want) << Load(kEveryField)->text;
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
  want.model.layers = *ParsePattern("(A -)^2", {});
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
  EXPECT_FALSE(no_rope.model.layers[0].rope_theta.has_value());
  EXPECT_EQ(SpecOf(Changed("steps: 100", "steps: 100 schedule { constant {} }")).optim.schedule.kind,
            ScheduleKind::kConstant);
}

TEST(Config, ResolvedTextNamesEverySource) {
  const auto config = Load(Changed("sequences_per_step: 8", "tokens_per_step: 640"),
                           {"optim.adamw.beta1=0.5", "data.train[0].text={path:\"b\"}"}, 2);
  ASSERT_TRUE(config.ok()) << config.status();
  for (const char* line :
       {"\nname: \"small\"  # c.textproto:1\n", "\nseed: 0  # default\n", "\n    heads: 4  # c.textproto:5\n",
        "\n    head_dim: 16  # derived: d_model / heads\n",
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
       {std::string(kSampleConfig), std::string(kEveryField),
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
