// Studies as text: what they become, what is refused and where, and the resolved text.

#include "annulus/train/study_config.h"

#include <gtest/gtest.h>

#include "absl/strings/match.h"
#include "absl/strings/str_replace.h"

namespace annulus {
namespace {

constexpr char kStudy[] = R"(name: "s"
run: "../run/tiny.textproto"
set: "optim.micro_batch=2"
scaling: WEAK
grows: [SEQUENCES_PER_STEP, SEQ_LEN]
measure { steps: 5 repeats: 2 }
disturbance { jitter: 0.1 }
axes {
  hosts: [1, 2]
  ranks_per_host: 4
  cp: [1, 2]
  plan: [KV_RING, ULYSSES]
  model { label: "8 layers" set: "model.pattern=(A -)^8" }
  field { path: "optim.micro_batch" value: ["1", "2"] }
}
)";

std::string With(const std::string& from, const std::string& to) {
  std::string text = kStudy;
  EXPECT_EQ(absl::StrReplaceAll({{from, to}}, &text), 1) << from;
  return text;
}

std::string ErrorsOfStudy(const std::string& text, const std::vector<std::string>& overrides = {}) {
  const auto study = LoadStudy("/configs/study/s.textproto", text, overrides);
  return study.ok() ? "ok" : std::string(study.status().message());
}

TEST(StudyConfig, EveryFieldIsRead) {
  const auto study = LoadStudy("/configs/study/s.textproto", kStudy, {"seed=3"});
  ASSERT_TRUE(study.ok()) << study.status();
  const StudySpec want{
      .name = "s",
      .run = "/configs/run/tiny.textproto",
      .overrides = {"optim.micro_batch=2", "seed=3"},
      .machine = "",
      .scaling = Scaling::kWeak,
      .grow_sequences = true,
      .grow_seq_len = true,
      .steps = 5,
      .warm_up = 3,
      .repeats = 2,
      .limit_minutes = 30,
      .seed = 0,
      .jitter = 0.1,
      .straggler_share = 0,
      .straggler_slowdown = 1,
      .goodput_steps = 0,
      .hosts = {1, 2},
      .ranks_per_host = {4},
      .axes = {{"cp", {{"1", {"parallel.cp=1"}}, {"2", {"parallel.cp=2"}}}},
               {"plan",
                {{"KV_RING", {"parallel.exchange.plan=KV_RING"}},
                 {"ULYSSES", {"parallel.exchange.plan=ULYSSES"}}}},
               {"model", {{"8 layers", {"model.pattern=(A -)^8"}}}},
               {"optim.micro_batch", {{"1", {"optim.micro_batch=1"}}, {"2", {"optim.micro_batch=2"}}}}}};
  EXPECT_TRUE(study->spec == want) << study->text;
}

TEST(StudyConfig, ResolvedTextLoadsAnywhereAndSaysWhereValuesComeFrom) {
  const auto study = LoadStudy("/configs/study/s.textproto", kStudy, {"seed=3"});
  ASSERT_TRUE(study.ok()) << study.status();
  const auto again = LoadStudy("elsewhere/study.resolved.textproto", study->text);
  ASSERT_TRUE(again.ok()) << again.status() << "\n" << study->text;
  EXPECT_TRUE(again->spec == study->spec) << study->text;
  for (const char* line : {"run: \"/configs/run/tiny.textproto\"  # /configs/study/s.textproto:2\n",
                           "set: \"seed=3\"  # --set\n", "  warm_up: 3  # default\n",
                           "  hosts: 2  # /configs/study/s.textproto:9\n"}) {
    EXPECT_TRUE(absl::StrContains(study->text, line)) << line << "in\n" << study->text;
  }
}

TEST(StudyConfig, MistakesAreNamedWhereTheyStand) {
  const std::string file = "/configs/study/s.textproto:";
  const std::pair<std::string, std::string> cases[] = {
      {With("cp: [1, 2]", "cpp: [1, 2]"), "11:3: axes.cpp: no such field; did you mean `cp`?"},
      {With("cp: [1, 2]", "cp: [1, 0]"), "11:3: axes.cp[1]=0: expected an integer from 1 to 1048576"},
      {With("cp: [1, 2]", "cp: [1, 1]"), "11:3: axes.cp[1]=1: expected each value once"},
      {With("ULYSSES", "ULISSES"),
       "12:3: axes.plan[0]=ULISSES: expected one of AUTO, KV_RING, BIDIRECTIONAL_KV_RING, TOKEN_RING, "
       "BIDIRECTIONAL_TOKEN_RING, DIRECT_CAST, ALL_GATHER, BALANCED, DOUBLE_RING, MESH, ULYSSES, "
       "ARENA (did you mean `ULYSSES`?)"},
      {With("model.pattern", "model.patern"),
       "13:29: axes.model[0].set[0]=\"model.patern=(A -)^8\": `patern`: no such field; did you mean "
       "`pattern`?"},
      {With("path: \"optim.micro_batch\"", "path: \"optim.lr\""),
       "14:11: axes.field[0].path=\"optim.lr\": `lr`: no such field; did you mean `optim.adamw.lr`?"},
      {With("set: \"optim.micro_batch=2\"", "set: \"optim.micro_batch\""),
       "3:1: set[0]=\"optim.micro_batch\": expected path=value, such as optim.micro_batch=2"},
      {With("  ranks_per_host: 4\n", ""),
       "8:1: axes.ranks_per_host: missing; expected at least one number of ranks, such as [1, 2, 4]"},
      {With("grows: [SEQUENCES_PER_STEP, SEQ_LEN]\n", ""),
       "1:1: grows: missing; expected SEQUENCES_PER_STEP (with dp), SEQ_LEN (with cp) or both"},
      {With("name: \"s\"", "name: \"a/b\""),
       "1:1: name=\"a/b\": expected at most 100 letters, digits, '-', '_' or '.', not beginning with '.'"},
      {With("repeats: 2", "repeats: 0"),
       "6:20: measure.repeats=0: expected an integer from 1 to 1000 (nearest valid value 1)"},
      {With("field { path: \"optim.micro_batch\" value: [\"1\", \"2\"] }", "field { path: \"optim.steps\" }"),
       "14:3: axes.field[0].value: missing; expected at least one value in quotes"},
      {With("{ label: \"8 layers\"", "{"), "13:3: axes.model[0].label: missing; expected a text in quotes"},
  };
  for (const auto& [text, error] : cases) EXPECT_EQ(ErrorsOfStudy(text), file + error) << text;
  EXPECT_EQ(ErrorsOfStudy(kStudy, {"optim.step=3"}),
            "--set optim.step=3: `step`: no such field; did you mean `steps`?");
  EXPECT_EQ(ErrorsOfStudy(With("scaling: WEAK", "scaling: STRONG")),
            file + "5:1: grows[0]=SEQUENCES_PER_STEP: expected scaling: WEAK with it\n" + file +
                "5:1: grows[1]=SEQ_LEN: expected scaling: WEAK with it");
}

// Whatever is set later would win, and points under different labels would be the same run.
TEST(StudyConfig, NoFieldIsSetByTwoAxes) {
  const auto error = [](const std::string& axes) {
    return ErrorsOfStudy(absl::StrCat("name: \"s\" run: \"r\" axes {\nranks_per_host: 4 ", axes, "}"));
  };
  const auto refused = [](const std::string& axis, const std::string& field, const std::string& why) {
    return absl::StrCat("/configs/study/s.textproto:1:20: axes={ ... ", axis,
                        " ... }: expected no axis that sets ", field, ": ", why);
  };
  const auto field = [](const std::string& path) {
    return absl::StrCat("field { path: \"", path, "\" value: \"1\" } ");
  };
  EXPECT_EQ(error("dp: 1 " + field("parallel.dp")),
            refused("parallel.dp", "parallel.dp", "the axis dp sets it too"));
  EXPECT_EQ(error(field("parallel.dp")),
            refused("parallel.dp", "parallel.dp", "it follows from the ranks, or is given by the axis dp"));
  EXPECT_EQ(error("dp: 1 " + field("parallel.cp")),
            refused("parallel.cp", "parallel.cp", "it follows from the ranks, or is given by the axis cp"));
  EXPECT_EQ(error(field("parallel.cp")), "ok");
  EXPECT_EQ(error("tp: 1 model { label: \"a\" set: [\"seed=1\", \"parallel.tp=1\"] }"),
            refused("model", "parallel.tp", "the axis tp sets it too"));
  EXPECT_EQ(error("seq_len: 64 " + field("data.seq_len")),
            refused("seq_len", "data.seq_len", "the axis data.seq_len sets it too"));
  EXPECT_EQ(
      error("model { label: \"a\" set: \"model.mlp.d_ff=8\" } field { path: \"model.mlp\" value: \"{}\" }"),
      refused("model", "model.mlp.d_ff", "the axis model.mlp sets it too"));
  EXPECT_EQ(error("model { label: \"a\" set: \"model.mlp={}\" } " + field("model.mlp.d_ff")), "ok");
  EXPECT_EQ(error(field("optim.steps")),
            refused("optim.steps", "optim.steps", "it is the same in all runs that are measured"));
  EXPECT_EQ(error(field("checkpoint.every_steps")), "ok") << "goodput goes by it";
}

TEST(StudyConfig, AxesAreBounded) {
  std::string values;
  for (int i = 0; i < 2500; ++i) absl::StrAppend(&values, i == 0 ? "" : ", ", i + 1);
  EXPECT_EQ(
      ErrorsOfStudy(With("cp: [1, 2]", absl::StrCat("cp: [1, 2] seq_len: [", values, "]"))),
      "/configs/study/s.textproto:8:1: axes={ ... }: expected at most 10000 points, the product of all axes");
}

}  // namespace
}  // namespace annulus
