// Commands about exchange plans: `check` proves them, `plan` compares and draws them, `calibrate` measures
// what they are chosen by, `bench plans` runs them, and a run says what became of its predictions.

#include <set>

#include "annulus/comm/exchange_build.h"
#include "system/tiny_run.h"

namespace annulus::testing {
namespace {

using Strings = std::vector<std::string>;

class PlanCommands : public ::testing::Test {
 protected:
  void SetUp() override { WriteTinyInputs(folder_.path()); }

  JobResult Run(int ranks, Strings arguments) const {
    return RunJob({.folder = folder_.path(), .ranks = ranks, .arguments = std::move(arguments)}, 120);
  }
  nlohmann::json PlanJson(Strings more) const {
    more.insert(more.begin(), {"plan", "c.textproto", "--json", "--set", "parallel.cp=4", "--set",
                               "model.attention.heads=4"});
    const JobResult result = Run(1, more);
    EXPECT_TRUE(result.in_time && result.exit_code == 0) << result;
    nlohmann::json json = nlohmann::json::parse(result.out, nullptr, /*allow_exceptions=*/false);
    EXPECT_TRUE(json.is_object()) << result;
    return json;
  }
  std::string Path(const std::string& name) const { return folder_.path() + "/" + name; }

  const TemporaryFolder folder_;
};

TEST_F(PlanCommands, CheckProvesThePlansOfTheWholeWorld) {
  const JobResult result = Run(1, {"check", "c.textproto", "--world", "6", "--set", "parallel.cp=6", "--set",
                                   "optim.sequences_per_step=6", "--set", "parallel.exchange.plan=MESH",
                                   "--set", "model.pattern=A - A{w=5}"});
  ASSERT_EQ(result.exit_code, 0) << result;
  for (const char* layers : {"(all keys)", "(window 5)"}) {
    for (const char* pass : {"forward", "backward"}) {
      const std::string line =
          absl::StrCat("exchange of 1 attention layer ", layers, " ", pass, " on 6 ranks: mesh of ");
      EXPECT_TRUE(absl::StrContains(result.out, line)) << line << result;
    }
  }
  EXPECT_TRUE(absl::StrContains(result.out, ", proved\n")) << result;
  EXPECT_TRUE(absl::StrContains(result.out, "c.textproto: valid for 6 ranks")) << result;
}

TEST_F(PlanCommands, CheckNamesWhatCannotBe) {
  const std::pair<Strings, std::string> cases[] = {
      {{"parallel.exchange.head_split=3"}, "parallel.exchange.head_split=3: expected 0 or a divisor"},
      {{"parallel.exchange.plan=MESH", "parallel.exchange.inner=3"},
       "parallel.exchange.inner=3: expected 0 or"},
      {{"parallel.exchange.plan=RING"}, "expected one of AUTO, KV_RING"},
      {{"parallel.exchange.throttle_gb_per_second=-1"},
       "throttle_gb_per_second=-1: expected a number in [0,"},
      {{"parallel.exchange.buffer_gib=1e-9"}, "no forward plan can be:"},
      {{"parallel.exchange.profile=absent"}, "absent: open: No such file"}};
  for (const auto& [settings, message] : cases) {
    Strings arguments = {"check", "c.textproto", "--set", "parallel.cp=4"};
    for (const std::string& setting : settings) arguments.insert(arguments.end(), {"--set", setting});
    const JobResult result = Run(1, arguments);
    EXPECT_NE(result.exit_code, 0) << result;
    EXPECT_EQ(ErrorLines(result).size(), 1u) << result;
    EXPECT_TRUE(absl::StrContains(result.err, message)) << message << result;
  }
}

TEST_F(PlanCommands, PlanComparesAllAndSaysWhyOneWon) {
  const nlohmann::json json = PlanJson({});
  EXPECT_FALSE(json["machine"]["measured"].get<bool>());
  ASSERT_EQ(json["exchange"].size(), 2u);
  for (const nlohmann::json& pass : json["exchange"]) {
    EXPECT_EQ(pass["layers"].size(), 2u);
    EXPECT_EQ(pass["candidates"][0]["plan"], pass["plan"]);
    EXPECT_NE(pass["why"], "");
    EXPECT_EQ(pass["bytes_sent_per_rank"].size(), 4u);
    std::set<std::string> names;
    for (const nlohmann::json& candidate : pass["candidates"]) {
      names.insert(candidate["plan"].get<std::string>());
      EXPECT_GE(candidate["predicted_seconds"], 0.999 * pass["predicted_seconds"].get<double>()) << candidate;
    }
    EXPECT_EQ(pass["candidates"].size(), names.size());
    for (const char* name : {"ulysses", "all_gather", "mesh of 2 x 2", "double_ring of 2 x 2", "balanced"}) {
      EXPECT_EQ(names.count(name), 1u) << name;
    }
  }
}

TEST_F(PlanCommands, PlanShowsAndDrawsTheChoice) {
  const nlohmann::json json = PlanJson({"--choice", "ulysses", "--svg", "p.svg"});
  for (const nlohmann::json& pass : json["exchange"]) EXPECT_EQ(pass["plan"], "ulysses");
  const std::string svg = Contents(Path("p.svg"));
  EXPECT_TRUE(absl::StartsWith(svg, "<svg ")) << svg.substr(0, 100);
  EXPECT_TRUE(absl::StrContains(svg, "ulysses"));
  size_t pictures = 0;
  for (size_t at = 0; (at = svg.find("<svg ", at)) != std::string::npos; ++at) ++pictures;
  EXPECT_EQ(pictures, 3u) << "forward and backward, in one";

  const JobResult text = Run(1, {"plan", "c.textproto", "--set", "parallel.cp=2", "--set",
                                 "parallel.exchange.throttle_gb_per_second=0.25"});
  for (const char* part : {"plan  ", "predicted", "why: ", "rank 1", "LINKS THROTTLED to 0.25 GB/s"}) {
    EXPECT_TRUE(absl::StrContains(text.out, part)) << part << text;
  }
  EXPECT_TRUE(absl::StrContains(text.out, "exchange buffers  ")) << text;
  const JobResult one = Run(1, {"plan", "c.textproto", "--set", "parallel.cp=1"});
  EXPECT_TRUE(absl::StrContains(one.out, "  no exchange: one rank has all keys; predicted ")) << one;
  const JobResult wrong = Run(1, {"plan", "c.textproto", "--set", "parallel.cp=2", "--choice", "ring"});
  EXPECT_EQ(ErrorLines(wrong).size(), 1u) << wrong;
  EXPECT_TRUE(absl::StrContains(wrong.err, "choice=ring: expected a forward plan, by its kind ")) << wrong;
}

TEST_F(PlanCommands, FitSearchesTheLayout) {
  const Strings command = {"plan", "c.textproto", "--gpus", "4", "--fit"};
  const auto with = [&](Strings more) {
    more.insert(more.begin(), command.begin(), command.end());
    return Run(1, more);
  };
  const JobResult text = with({});
  for (const char* part : {" 1. dp ", "tok/s", "computing ", "parameters ", "the others lost:\n",
                           "the best: --set parallel.dp="}) {
    EXPECT_TRUE(absl::StrContains(text.out, part)) << part << text;
  }
  const JobResult result = with({"--json"});
  const nlohmann::json json = nlohmann::json::parse(result.out, nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(json.is_object()) << result;
  // The overrides make a configuration of which the same is predicted.
  const nlohmann::json& best = json["best"][0];
  Strings plan = {"plan", "c.textproto", "--json", "--world", "4"};
  for (const absl::string_view word : absl::StrSplit(best["overrides"].get<std::string>(), ' '))
    plan.emplace_back(word);
  const JobResult made = Run(1, plan);
  const nlohmann::json planned = nlohmann::json::parse(made.out, nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(planned.is_object()) << made;
  EXPECT_EQ(planned["predicted_step"]["step_seconds"], best["predicted"]["step_seconds"]);

  const JobResult tight = with({"--memory-gib", "1e-6"});
  EXPECT_EQ(ErrorLines(tight).size(), 1u) << tight;
  EXPECT_TRUE(absl::StrContains(tight.err, "memory: no layout on 4 ranks fits: ")) << tight;
  const JobResult alone = Run(1, {"plan", "c.textproto", "--fit"});
  EXPECT_EQ(ErrorLines(alone).size(), 1u) << alone;
  EXPECT_TRUE(absl::StrContains(alone.err, "--fit: expected --gpus N with it")) << alone;
}

// Objects that a bench prints.
std::vector<nlohmann::json> Objects(const JobResult& result) {
  EXPECT_TRUE(result.in_time && result.exit_code == 0) << result;
  std::vector<nlohmann::json> objects;
  for (const absl::string_view line : absl::StrSplit(result.out, '\n', absl::SkipEmpty())) {
    objects.push_back(nlohmann::json::parse(std::string(line), nullptr, /*allow_exceptions=*/false));
    EXPECT_TRUE(objects.back().is_object()) << line;
  }
  return objects;
}

TEST_F(PlanCommands, ACalibratedProfilePredictsWhatBenchPlansMeasures) {
  const JobResult calibrated = Run(2, {"calibrate", "--set", "device=CPU", "--heads", "2", "--head_dim", "8",
                                       "--seconds", "0.1", "--out", "m.textproto"});
  ASSERT_EQ(calibrated.exit_code, 0) << calibrated;
  EXPECT_TRUE(absl::StrContains(calibrated.out, "written to m.textproto")) << calibrated;
  EXPECT_TRUE(absl::StrContains(Contents(Path("m.textproto")), "measured: true"));

  const std::vector<nlohmann::json> results = Objects(
      Run(3, {"bench",    "plans",     "--json",      "--repeats", "1",          "--set",      "device=CPU",
              "--length", "50",        "--heads",     "3",         "--kv_heads", "1",          "--dim",
              "8",        "--profile", "m.textproto", "--svg",     "b.svg",      "--throttle", "5"}));
  ASSERT_GE(results.size(), 2 * AllChoices(3, 3).size());  // some in parts, too
  for (const nlohmann::json& result : results) {
    EXPECT_EQ(result["bytes_sent"], result["predicted_bytes"]) << result;
    EXPECT_LT(result["difference_to_one_rank"], 1e-5) << result;
    EXPECT_GT(result["predicted_ms"], 0.0);
    EXPECT_GT(result["measured_ms"], 0.0);
    EXPECT_EQ(result["throttle_gb_per_second"], 5.0);
  }
  EXPECT_TRUE(absl::StartsWith(Contents(Path("b.svg")), "<svg "));
}

TEST_F(PlanCommands, BenchPlansTakesEveryMaskAndOneChoice) {
  for (const Strings& mask :
       {Strings{"full"}, {"documents", "--document_length", "9"}, {"window", "--window", "7"}}) {
    Strings arguments = {"bench", "plans",   "--json", "--repeats", "1", "--set",    "device=CPU", "--length",
                         "40",    "--heads", "2",      "--dim",     "4", "--choice", "ulysses",    "--mask"};
    arguments.insert(arguments.end(), mask.begin(), mask.end());
    const std::vector<nlohmann::json> results = Objects(Run(2, arguments));
    ASSERT_EQ(results.size(), 2u) << mask[0];
    for (const nlohmann::json& result : results) {
      EXPECT_EQ(result["plan"], "ulysses");
      EXPECT_LT(result["difference_to_one_rank"], 1e-5) << mask[0] << result;
    }
  }
}

TEST_F(PlanCommands, ARunSaysWhatBecameOfItsPredictions) {
  const JobResult result = RunJob(TrainJob(
      folder_.path(), 2, "run",
      {"parallel.cp=2", "parallel.exchange.plan=TOKEN_RING", "parallel.exchange.throttle_gb_per_second=3"}));
  ExpectDone(result);
  for (const char* part : {"machine profile: assumed: CPU", "LINKS THROTTLED to 3 GB/s",
                           "attention (all keys) forward: token_ring toward ", " | LINKS THROTTLED to 3 GB/s",
                           " a layer (median of 7 steps)"}) {
    EXPECT_TRUE(absl::StrContains(result.out, part)) << part << result;
  }
  const std::vector<nlohmann::json> metrics = ReadMetrics(Path("run"));
  ASSERT_EQ(metrics.size(), 8u);
  for (const nlohmann::json& step : metrics) {
    ASSERT_EQ(step["attention"].size(), 2u) << step;
    EXPECT_EQ(step["throttle_gb_per_second"], 3.0);
    for (const nlohmann::json& attention : step["attention"]) {
      EXPECT_TRUE(absl::StartsWith(attention["plan"].get<std::string>(), "token_ring")) << attention;
      EXPECT_GT(attention["predicted_ms"], 0.0);
      EXPECT_GT(attention["measured_ms"], 0.0);
    }
  }
}

}  // namespace
}  // namespace annulus::testing
