// Every class of error, with the exact place and words.

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "sample_config.h"

namespace annulus {
namespace {

TEST(ConfigErrors, Syntax) {
  EXPECT_EQ(ErrorsOf("name \"x\""), "c.textproto:1:6: Expected \":\", found \"\"x\"\".");
  EXPECT_EQ(ErrorsOf("optim {\n  steps: 5\n"),
            "c.textproto:3:1: optim.steps: expected identifier, got: the end of the text");
  EXPECT_EQ(ErrorsOf("}"), "c.textproto:1:1: Expected identifier, got: }");
  EXPECT_EQ(ErrorsOf("name: \"x"), "c.textproto:1:9: name: unexpected end of string.");
  EXPECT_EQ(ErrorsOf("seed: 1\n seed: 2"), "c.textproto:2:2: seed: expected once, found again");
  EXPECT_EQ(
      ErrorsOf("optim { sequences_per_step: 1 tokens_per_step: 2 }"),
      "c.textproto:1:46: optim.tokens_per_step: field \"tokens_per_step\" is specified along with field "
      "\"sequences_per_step\", another member of oneof \"batch\".");
}

TEST(ConfigErrors, Types) {
  EXPECT_EQ(ErrorsOf("optim {\n  steps: 1.5 }"), "c.textproto:2:10: optim.steps: expected integer, got: 1.5");
  EXPECT_EQ(ErrorsOf("optim { adamw { lr: \"a\" } }"),
            "c.textproto:1:21: optim.adamw.lr: expected double, got: \"a\"");
  EXPECT_EQ(ErrorsOf("seed: -1"), "c.textproto:1:7: seed: expected integer, got: -");
  EXPECT_EQ(ErrorsOf("data { seq_len: 99999999999999999999 }"),
            "c.textproto:1:17: data.seq_len: integer out of range (99999999999999999999)");
  EXPECT_EQ(ErrorsOf("data { train { } train { weight: x } }"),
            "c.textproto:1:34: data.train[1].weight: expected double, got: x");
  EXPECT_EQ(ErrorsOf("data { train [ { }, { weight: x } ] }"),
            "c.textproto:1:31: data.train[1].weight: expected double, got: x");
}

TEST(ConfigErrors, UnknownFieldsAreAllFoundWithSuggestions) {
  EXPECT_EQ(ErrorsOf(Changed("adamw { lr", "adamw { lrr: 2 lr")),
            "c.textproto:13:11: optim.adamw.lrr: no such field; did you mean `lr`?");
  EXPECT_EQ(ErrorsOf(Changed("steps: 100", "setps: 3 steps: 100 lr: 3")),
            "c.textproto:14:3: optim.setps: no such field; did you mean `steps`?\n"
            "c.textproto:14:23: optim.lr: no such field; did you mean `optim.adamw.lr`?");
  EXPECT_EQ(ErrorsOf(Changed("{ d_ff: 128 }", "{ d_ff: 128\n hidden { x: 1 y { } } }")),
            "c.textproto:7:2: model.mlp.hidden: no such field; expected one of d_ff, activation");
  EXPECT_EQ(ErrorsOf(Changed("seq_len: 64", "Seq_Len: 64 seq_len: 64")),
            "c.textproto:10:3: data.Seq_Len: no such field; did you mean `seq_len`?");
}

TEST(ConfigErrors, UnknownEnumValues) {
  EXPECT_EQ(ErrorsOf("parallel {\n layout: ZIGZAGG\n}"),
            "c.textproto:2:2: parallel.layout=ZIGZAGG: expected one of CONTIGUOUS, ZIGZAG, STRIPED "
            "(did you mean `ZIGZAG`?)");
  EXPECT_EQ(ErrorsOf("recompute: block"),
            "c.textproto:1:1: recompute=block: expected one of NONE, ATTENTION_OUTPUT, BLOCK, ELEMENTWISE "
            "(did you mean `BLOCK`?)");
  EXPECT_EQ(ErrorsOf("checkpoint { on_signal: SIGTERM }"),
            "c.textproto:1:14: checkpoint.on_signal=SIGTERM: expected SIGUSR1");
  EXPECT_EQ(ErrorsOf(Changed("optim {", "parallel { layout: 7 } optim {")),
            "c.textproto:12:12: parallel.layout=7: expected one of CONTIGUOUS, ZIGZAG, STRIPED");
}

TEST(ConfigErrors, ComputeTypesThatADeviceLacks) {
  EXPECT_EQ(ErrorsOf(kSampleConfig, {"compute=F64", "device=CUDA"}),
            "--set compute=F64: expected F32 or BF16 with device=CUDA (nearest valid value F32)");
  EXPECT_EQ(ErrorsOf(kSampleConfig, {"compute=BF16", "device=CPU"}),
            "--set compute=BF16: expected F32 or F64 with device=CPU (nearest valid value F32)");
  EXPECT_EQ(
      ErrorsOf(kSampleConfig, {"parallel.exchange.transport=COPY_ENGINE", "device=CPU"}),
      "--set parallel.exchange.transport=COPY_ENGINE: expected BEST or HOST with device=CPU (nearest valid "
      "value BEST)");
}

TEST(ConfigErrors, PlansThatTheRanksCannotHave) {
  const auto error = [](const std::vector<std::string>& overrides) {
    return ErrorsOf(Changed("optim {", "parallel { cp: 6 } optim {"), overrides);
  };
  EXPECT_EQ(error({"parallel.exchange.head_split=4"}),
            "--set parallel.exchange.head_split=4: expected 0 or a divisor of parallel.cp=6 (nearest valid "
            "value 3 or 6)");
  EXPECT_EQ(error({"parallel.exchange.forward={plan: ULYSSES head_split: 3}"}),
            "--set parallel.exchange.forward={plan: ULYSSES head_split: 3}: "
            "parallel.exchange.forward.head_split=3: expected 0 or parallel.cp=6 with plan=ULYSSES (nearest "
            "valid value 6)");
  EXPECT_EQ(
      error({"parallel.exchange.plan=MESH", "parallel.exchange.head_split=2", "parallel.exchange.inner=2"}),
      "--set parallel.exchange.inner=2: expected 0 or a divisor of parallel.cp=6 / head_split=2 "
      "(nearest valid value 1 or 3)");
  EXPECT_EQ(error({"parallel.exchange.plan=KV_RING", "parallel.exchange.inner=2"}),
            "--set parallel.exchange.inner=2: expected 0 with plan=KV_RING, since only DOUBLE_RING and MESH "
            "have it (nearest valid value 0)");
  EXPECT_EQ(error({"parallel.exchange.plan=ARENA", "parallel.exchange.head_split=3"}),
            "--set parallel.exchange.head_split=3: expected 0 or 1 with plan=ARENA, whose ranks compute all "
            "heads (nearest valid value 1)");
  EXPECT_EQ(error({"parallel.exchange.plan=ARENA", "parallel.exchange.parts=2"}), "ok");
  EXPECT_EQ(error({"parallel.exchange.plan=BALANCED", "parallel.exchange.direction=TOWARD_LOWER"}),
            "--set parallel.exchange.direction=TOWARD_LOWER: expected FEWEST_ROWS with plan=BALANCED, which "
            "is no one-way ring");
  EXPECT_EQ(error({"parallel.exchange.plan=ULYSSES", "parallel.exchange.parts=3"}),
            "--set parallel.exchange.parts=3: expected 0 or 1 with plan=ULYSSES, whose blocks travel whole "
            "(nearest valid value 1)");
  EXPECT_EQ(error({"parallel.exchange.plan=ULYSSES", "parallel.exchange.parts=1"}), "ok");
  EXPECT_EQ(
      error({"parallel.exchange.plan=KV_RING", "parallel.exchange.output_width=COMPUTE"}),
      "--set parallel.exchange.output_width=COMPUTE: expected ACCUMULATOR with plan=KV_RING, by which no "
      "partial outputs travel");
  EXPECT_EQ(error({"parallel.exchange.plan=MESH", "parallel.exchange.output_width=COMPUTE"}), "ok");
  // What both passes replace is not looked at.
  EXPECT_EQ(error({"parallel.exchange.head_split=4", "parallel.exchange.forward.head_split=2",
                   "parallel.exchange.backward.head_split=3"}),
            "ok");
}

TEST(ConfigErrors, MissingValuesAreNamedAtTheirMessage) {
  EXPECT_EQ(ErrorsOf(Changed("name: \"small\"", "")),
            "c.textproto:1:1: name: missing; expected a text in quotes");
  EXPECT_EQ(ErrorsOf(Changed("lr: 1e-3", "")),
            "c.textproto:13:3: optim.adamw.lr: missing; expected a number in (0, 1e+09]");
  EXPECT_EQ(ErrorsOf(Changed("mlp { d_ff: 128 }", "")),
            "c.textproto:2:1: model.mlp: missing; expected mlp { ... } with d_ff, activation");
  EXPECT_EQ(ErrorsOf(Changed("  train { text { path: \"a.txt\" } }\n", "  train { weight: 2 }\n")),
            "c.textproto:9:3: data.train[0]: missing; expected one of text { path }, megatron { prefix }, "
            "llmc { path }");
}

constexpr char kRecall[] = "recall { task { length: 64 pairs: 4 } task { length: 32 pairs: 8 } }";

TEST(ConfigErrors, RecallThatDoesNotFit) {
  const auto error = [](const std::string& override, const std::string& data = kRecall) {
    return ErrorsOf(Changed("train { text { path: \"a.txt\" } }", data), {"model.vocab_size=40", override});
  };
  EXPECT_EQ(error("eval.every_steps=5"), "ok");
  EXPECT_EQ(ErrorsOf(Changed("train { text { path: \"a.txt\" } }", kRecall)),
            "c.textproto:2:1: model.vocab_size: missing; expected an integer from 1 to 2147483647");
  EXPECT_EQ(error("seed=1", "recall { }"),
            "c.textproto:9:3: data.recall.task: missing; expected at least one, such as task { length: 64 "
            "pairs: 4 }");
  EXPECT_EQ(error("seed=1", "recall { task { length: 8 } }"),
            "c.textproto:9:12: data.recall.task[0].pairs: missing; expected an integer from 1 to 1073741824");
  EXPECT_EQ(error("data.recall.task[0].length=65"),
            "--set data.recall.task[0].length=65: expected at most data.seq_len=64 (nearest valid value 64)");
  EXPECT_EQ(
      error("data.recall.task[1].pairs=9"),
      "--set data.recall.task[1].pairs=9: expected at most a fourth of length=32 (nearest valid value 8)");
  EXPECT_EQ(error("seed=1", absl::StrCat(kRecall, "recall { validation_task { length: 64 pairs: 17 } }")),
            "c.textproto:9:71: data.recall: expected once, found again");
  EXPECT_EQ(
      error("seed=1", "recall { task { length: 8 pairs: 1 } validation_task { length: 64 pairs: 17 } }"),
      "c.textproto:9:69: data.recall.validation_task[0].pairs=17: expected at most a fourth of "
      "length=64 (nearest valid value 16)");
  EXPECT_EQ(error("model.vocab_size=16"),
            "c.textproto:9:59: data.recall.task[1].pairs=8: expected at most the 7 keys in the lower half of "
            "model.vocab_size=16");
  EXPECT_EQ(error("seed=1", absl::StrCat("train { text { path: \"a\" } } ", kRecall)),
            "c.textproto:8:1: data.train=1 source: expected none, since data.recall is given");
  EXPECT_EQ(
      error("data.validation_fraction=0.1"),
      "--set data.validation_fraction=0.1: expected 0, since data.recall is given (nearest valid value 0)");
  EXPECT_EQ(error("data.packing=DOCUMENTS"),
            "--set data.packing=DOCUMENTS: expected STREAM, since data.recall is given (nearest valid value "
            "STREAM)");
  EXPECT_EQ(error("data.recall.train_sequences=0"),
            "--set data.recall.train_sequences=0: expected an integer from 1 to 1099511627776 (nearest valid "
            "value 1)");
  EXPECT_EQ(
      error("eval.every_steps=5", absl::StrCat("recall { validation_sequences: 0 ", kRecall + 9)),
      "--set eval.every_steps=5: expected data.recall.validation_sequences to evaluate on (nearest valid "
      "value 0)");
}

TEST(ConfigErrors, EveryNumberHasARange) {
  const auto error = [](const std::string& override) { return ErrorsOf(kSampleConfig, {override}); };
  const std::string integer = ": expected an integer from ";
  for (const std::string path :
       {"model.d_model", "model.vocab_size", "model.attention.heads", "model.attention.kv_heads",
        "model.attention.head_dim", "model.mlp.d_ff", "data.seq_len", "parallel.dp", "parallel.cp",
        "parallel.tp", "optim.steps", "optim.sequences_per_step", "optim.tokens_per_step",
        "optim.micro_batch", "optim.schedule.warmup_stable_decay.decay_steps"}) {
    EXPECT_TRUE(absl::StartsWith(error(path + "=0"), "--set " + path + "=0" + integer + "1 to "))
        << error(path + "=0");
    EXPECT_TRUE(absl::EndsWith(error(path + "=0"), " (nearest valid value 1)")) << error(path + "=0");
    const std::string huge = path + "=9223372036854775807";
    EXPECT_TRUE(absl::StartsWith(error(huge), "--set " + huge + integer)) << error(huge);
  }
  for (const std::string path :
       {"model.attention.window", "optim.schedule.cosine.warmup_steps",
        "optim.schedule.constant.warmup_steps", "optim.schedule.warmup_stable_decay.warmup_steps",
        "checkpoint.every_steps", "checkpoint.keep", "eval.every_steps", "eval.sequences", "sample.tokens",
        "parallel.exchange.head_split", "parallel.exchange.inner", "parallel.exchange.forward.parts"}) {
    EXPECT_TRUE(absl::StartsWith(error(path + "=-1"), "--set " + path + "=-1" + integer + "0 to "))
        << error(path + "=-1");
  }
  for (const std::string path :
       {"model.norm_eps", "model.init_stddev", "model.attention.rope_theta", "data.train[0].weight",
        "data.validation_fraction", "optim.adamw.lr", "optim.adamw.beta1", "optim.adamw.beta2",
        "optim.adamw.eps", "optim.adamw.weight_decay", "optim.clip_norm", "optim.schedule.cosine.final_ratio",
        "sample.temperature", "parallel.exchange.throttle_gb_per_second", "parallel.exchange.buffer_gib"}) {
    for (const std::string value : {"nan", "inf", "-inf", "-1"}) {
      const std::string override = path + "=" + value;
      EXPECT_TRUE(absl::StartsWith(error(override), "--set " + override + ": expected a number in "))
          << override << " gave " << error(override);
    }
  }
  EXPECT_EQ(ErrorsOf(Changed("lr: 1e-3", "lr: 1 beta1: 1 beta2: -0.5")),
            "c.textproto:13:17: optim.adamw.beta1=1: expected a number in [0, 1)\n"
            "c.textproto:13:26: optim.adamw.beta2=-0.5: expected a number in [0, 1) (nearest valid value 0)");
}

TEST(ConfigErrors, Texts) {
  EXPECT_EQ(
      ErrorsOf(Changed("\"small\"", "\"a/b\"")),
      "c.textproto:1:1: name=\"a/b\": expected at most 100 letters, digits, '-', '_' or '.', not beginning "
      "with '.'");
  EXPECT_TRUE(
      absl::StartsWith(ErrorsOf(Changed("\"small\"", "\"..\"")), "c.textproto:1:1: name=\"..\": expected"));
  EXPECT_EQ(ErrorsOf(Changed("\"a.txt\"", "\"\"")),
            "c.textproto:9:18: data.train[0].text.path=\"\": expected a text that is not empty");
  EXPECT_EQ(
      ErrorsOf(Changed("\"a.txt\"", "\"a\\000b\"")),
      "c.textproto:9:18: data.train[0].text.path=\"a\\000b\": expected a path that is not empty and holds no "
      "zero byte");
  EXPECT_EQ(ErrorsOf(kSampleConfig, {"runs_dir="}),
            "--set runs_dir=: expected a path that is not empty and holds no zero byte");
}

TEST(ConfigErrors, PatternsAreNamedByColumn) {
  EXPECT_EQ(
      ErrorsOf(Changed("(A -)^2", "(E -)^2 A")),
      "c.textproto:3:3: model.pattern=\"(E -)^2 A\": column 2: E (mixture of experts) is planned but not "
      "available; expected A, T, M, L, B, G or -");
}

TEST(ConfigErrors, BetweenFields) {
  EXPECT_EQ(ErrorsOf(Changed("heads: 4 kv_heads: 2", "heads: 6 kv_heads: 4 head_dim: 16")),
            "c.textproto:5:15: model.attention.heads=6: expected a multiple of model.attention.kv_heads=4 "
            "(nearest valid value 4 or 8)");
  EXPECT_EQ(ErrorsOf(Changed("kv_heads: 2", "kv_heads: 2 rotary_dim: 18")),
            "c.textproto:5:36: model.attention.rotary_dim=18: expected an even number up to "
            "model.attention.head_dim=16");
  EXPECT_EQ(ErrorsOf(Changed("kv_heads: 2", "kv_heads: 2 head_dim: 7")),
            "c.textproto:5:36: model.attention.head_dim=7: expected an even number of at least 2 "
            "(nearest valid value 6 or 8)");
  EXPECT_EQ(ErrorsOf(Changed("heads: 4 kv_heads: 2", "heads: 5")),
            "c.textproto:5:3: model.attention.head_dim: missing; expected it, since model.d_model=64 is no "
            "multiple of heads=5");
  EXPECT_EQ(ErrorsOf(Changed("steps: 100", "steps: 5 schedule { cosine { warmup_steps: 9 } }")),
            "c.textproto:14:32: optim.schedule.cosine.warmup_steps=9: expected at most optim.steps=5 "
            "(nearest valid value 5)");
  EXPECT_EQ(
      ErrorsOf(Changed("steps: 100",
                       "steps: 9 schedule { warmup_stable_decay { warmup_steps: 5 decay_steps: 6 } }")),
      "c.textproto:14:45: optim.schedule.warmup_stable_decay.warmup_steps=5: expected at most optim.steps=9 "
      "- decay_steps=6 (nearest valid value 3)");
  EXPECT_EQ(
      ErrorsOf(Changed("sequences_per_step: 8", "sequences_per_step: 8 micro_batch: 3")),
      "c.textproto:15:3: optim.sequences_per_step=8: expected a multiple of dp * micro_batch = 1 * 3 = 3 "
      "(nearest valid value 6 or 9)");
  EXPECT_EQ(ErrorsOf(Changed("sequences_per_step: 8", "tokens_per_step: 100")),
            "c.textproto:15:3: optim.tokens_per_step=100: expected a multiple of data.seq_len=64 "
            "(nearest valid value 64 or 128)");
  EXPECT_EQ(ErrorsOf(Changed("seq_len: 64",
                             "seq_len: 64 validation_fraction: 0.5 validation { text { path: \"v\" } }")),
            "c.textproto:10:15: data.validation_fraction=0.5: expected 0, since data.validation is given "
            "(nearest valid value 0)");
  EXPECT_EQ(ErrorsOf(Changed("seq_len: 64", "seq_len: 64 document_mask: true"), {"model.pattern=meta=3 A -"}),
            "c.textproto:10:15: data.document_mask=true: expected false with meta=3 in model.pattern, since "
            "a query "
            "sees one range of keys: meta tokens and its own document are two in all documents but the first "
            "(nearest valid value false)");
  EXPECT_EQ(ErrorsOf(Changed("optim {", "eval { every_steps: 5 } optim {")),
            "c.textproto:12:8: eval.every_steps=5: expected data.validation or data.validation_fraction to "
            "evaluate "
            "on (nearest valid value 0)");
  EXPECT_EQ(ErrorsOf(Changed("text { path: \"a.txt\" }", "llmc { path: \"l\" document_start_token: 50256 }"),
                     {"model.vocab_size=50256"}),
            "c.textproto:9:28: data.train[0].llmc.document_start_token=50256: expected a token below "
            "model.vocab_size=50256");
  EXPECT_EQ(ErrorsOf(Changed("text { path: \"a.txt\" }", "llmc { path: \"l\" }")),
            "c.textproto:2:1: model.vocab_size: missing; expected an integer from 1 to 2147483647");
  EXPECT_EQ(ErrorsOf(kSampleConfig, {"parallel.tp=4"}), "ok");
  EXPECT_EQ(ErrorsOf(kSampleConfig, {"parallel.tp=8"}),
            "--set parallel.tp=8: expected a divisor of model.attention.heads=4 (nearest valid value 4)");
  EXPECT_EQ(ErrorsOf(kSampleConfig, {"optim.steps=4294967296", "optim.sequences_per_step=16777216",
                                     "data.seq_len=1073741824"}),
            "--set optim.steps=4294967296: expected steps * sequences_per_step * seq_len of at most 4.6e+18 "
            "tokens, "
            "got 7.73713e+25");
}

// Of kinds that the pattern names.
TEST(ConfigErrors, SectionsOfBranches) {
  EXPECT_EQ(
      ErrorsOf(Changed("(A -)^2", "(M+T -)^2")),
      "c.textproto:2:1: model.latent: missing; expected latent { ... } with heads, q_rank, kv_rank, "
      "nope_dim, rope_dim, v_dim, rope_theta, rope\n"
      "c.textproto:2:1: model.mamba: missing; expected mamba { ... } with heads, head_dim, state, groups, "
      "conv, chunk, dt_min, dt_max");
  EXPECT_EQ(ErrorsOf(Changed("(A -)^2\"", "(A -)^2\" mamba { head_dim: 3 state: 4 }")),
            "c.textproto:3:22: model.mamba.heads: missing; expected it, since 2 * model.d_model=128 is no "
            "multiple of head_dim=3");
  EXPECT_EQ(
      ErrorsOf(Changed("(A -)^2\"", "(T{g=4} -)^2\" latent { heads: 2 kv_rank: 6 nope_dim: 3 rope_dim: 3 }")),
      "c.textproto:3:68: model.latent.rope_dim=3: expected an even number of at least 2 (nearest valid "
      "value 2 or 4)\n"
      "c.textproto:3:45: model.latent.kv_rank=6: expected a multiple of g=4 (nearest valid value 4 or 8)");
  EXPECT_EQ(ErrorsOf(Changed("d_model: 64", "d_model: 64 rope_scaling { }")),
            "c.textproto:2:1: model.rope_scaling: missing; expected one of llama3 { ... }, yarn { ... }");
  EXPECT_EQ(
      ErrorsOf(Changed("d_model: 64", "d_model: 64 rope_scaling { yarn { factor: 4 } }")),
      "c.textproto:4:30: model.rope_scaling.yarn.original_length: missing; expected an integer from 1 to "
      "1073741824");
}

TEST(ConfigErrors, StatesDoNotPassAlongStripes) {
  const std::string mamba = Changed("(A -)^2\"", "(A M -)^2\" mamba { head_dim: 16 state: 4 }");
  const auto errors = [&](const std::vector<std::string>& overrides) { return ErrorsOf(mamba, overrides); };
  EXPECT_EQ(
      errors({"parallel.layout=STRIPED", "parallel.cp=2"}),
      "--set parallel.layout=STRIPED: expected ZIGZAG or CONTIGUOUS with parallel.cp=2 and layers M, whose "
      "states pass along runs of tokens");
  EXPECT_EQ(errors({"parallel.layout=STRIPED"}), "ok");
  EXPECT_EQ(errors({"parallel.cp=2"}), "ok");
}

TEST(ConfigErrors, AreCollectedInOneStatus) {
  const std::string text = Changed("d_model: 64", "d_model: 0 atention { heads: 3 }");
  const std::vector<std::string> lines =
      absl::StrSplit(ErrorsOf(text, {"optim.adamw.lr=0", "optim.stps=4"}), '\n');
  const std::vector<std::string> want = {
      "c.textproto:4:14: model.atention: no such field; did you mean `attention`?",
      "--set optim.stps=4: `stps`: no such field; did you mean `steps`?",
      "c.textproto:4:3: model.d_model=0: expected an integer from 1 to 1048576 (nearest valid value 1)",
      "--set optim.adamw.lr=0: expected a number in (0, 1e+09]"};
  EXPECT_EQ(lines, want);
}

TEST(ConfigErrors, Overrides) {
  const auto error = [](const std::string& override) { return ErrorsOf(kSampleConfig, {override}); };
  EXPECT_EQ(error("foo"), "--set foo: expected path=value, such as optim.adamw.lr=3e-4");
  EXPECT_EQ(error("=3"), "--set =3: expected a path such as optim.adamw.lr or data.train[0].weight");
  EXPECT_EQ(error("a..b=3"), "--set a..b=3: expected a path such as optim.adamw.lr or data.train[0].weight");
  EXPECT_EQ(error("optim.adam.lr=3"), "--set optim.adam.lr=3: `adam`: no such field; did you mean `adamw`?");
  EXPECT_EQ(error("lr=3"), "--set lr=3: `lr`: no such field; did you mean `optim.adamw.lr`?");
  EXPECT_EQ(error("optim.steps.x=3"), "--set optim.steps.x=3: steps is a single value and has no field `x`");
  EXPECT_EQ(error("optim.steps=abc"), "--set optim.steps=abc: expected an integer");
  EXPECT_EQ(error("optim.steps=5 6"), "--set optim.steps=5 6: expected an integer");
  EXPECT_EQ(error("optim.steps="), "--set optim.steps=: expected an integer");
  EXPECT_EQ(error("optim.adamw.lr=x"), "--set optim.adamw.lr=x: expected a number");
  EXPECT_EQ(error("model.tied_head=perhaps"), "--set model.tied_head=perhaps: expected true or false");
  EXPECT_EQ(error("seed=-1"), "--set seed=-1: expected an integer from 0 to 18446744073709551615");
  EXPECT_EQ(
      error("parallel.layout=zigzg"),
      "--set parallel.layout=zigzg: expected one of CONTIGUOUS, ZIGZAG, STRIPED (did you mean `ZIGZAG`?)");
  EXPECT_EQ(error("data.train.weight=2"),
            "--set data.train.weight=2: train is repeated; expected an index such as train[0]");
  EXPECT_EQ(error("data.train[2].weight=2"),
            "--set data.train[2].weight=2: expected an index from 0 to 1 (1 given so far; 1 appends one)");
  EXPECT_EQ(error("data.train[x].weight=2"),
            "--set data.train[x].weight=2: expected an index such as train[0]");
  EXPECT_EQ(error("data[0].seq_len=2"),
            "--set data[0].seq_len=2: data is not repeated; expected it without [0]");
  EXPECT_EQ(error("optim.schedule=cosine"),
            "--set optim.schedule=cosine: expected a field of it (constant, cosine, warmup_stable_decay) or "
            "a message "
            "in braces {...}");
  EXPECT_EQ(error("optim.schedule={cosin{}}"),
            "--set optim.schedule={cosin{}}: optim.schedule.cosin: no such field; did you mean `cosine`?");
  // A value inside a message that was set as a whole, and one that is missing there.
  EXPECT_EQ(error("optim.adamw={lr:-1}"),
            "--set optim.adamw={lr:-1}: optim.adamw.lr=-1: expected a number in (0, 1e+09]");
  EXPECT_EQ(
      error("data.train[0].megatron={}"),
      "--set data.train[0].megatron={}: data.train[0].megatron.prefix: missing; expected a text in quotes\n"
      "c.textproto:2:1: model.vocab_size: missing; expected an integer from 1 to 2147483647");
}

TEST(ConfigErrors, SizesAreBounded) {
  const std::string huge(size_t{1} << 20, '#');
  EXPECT_TRUE(Load(kSampleConfig + huge.substr(sizeof(kSampleConfig) - 1)).ok());
  EXPECT_EQ(ErrorsOf(huge + "#"), "c.textproto: 1048577 bytes of configuration; expected at most 1048576");
  EXPECT_EQ(ErrorsOf(kSampleConfig, std::vector<std::string>(1001, "seed=1")),
            "--set: 1001 overrides; expected at most 1000");
  EXPECT_TRUE(absl::EndsWith(ErrorsOf(kSampleConfig, {"name=" + std::string(5000, 'x')}),
                             "...: 5005 bytes; expected at most 1048"));
  // Depth and number of errors stay bounded on hostile texts of the largest size.
  for (const std::string piece :
       {"a{", "model{", "a:[", "data{train{", "a:1 ", "data{train{}}", "name:'' "}) {
    std::string text;
    while (text.size() + piece.size() <= (size_t{1} << 20)) text += piece;
    const std::string errors = ErrorsOf(text);
    EXPECT_NE(errors, "ok");
    EXPECT_LT(errors.size(), 20000u);
  }
}

}  // namespace
}  // namespace annulus
