// `annulus bench` on two ranks: one JSON object a result, whose rates are those of its times.

#include "system/tiny_run.h"

namespace annulus::testing {
namespace {

using Strings = std::vector<std::string>;

class BenchTest : public ::testing::Test {
 protected:
  void SetUp() override { WriteTinyInputs(folder_.path()); }

  JobResult Run(int ranks, Strings arguments) const {
    arguments.insert(arguments.begin(), "bench");
    return RunJob({.folder = folder_.path(), .ranks = ranks, .arguments = std::move(arguments)});
  }
  // One rank by itself: mpirun takes seconds to end after an error.
  JobResult RunAlone(const Strings& arguments, const std::string& subcommand = "bench") const {
    std::string command =
        absl::StrCat("cd '", folder_.path(), "' && '", ThisTree().program, "' ", subcommand);
    for (const std::string& argument : arguments) absl::StrAppend(&command, " '", argument, "'");
    const int status = std::system(absl::StrCat(command, " >out.txt 2>err.txt").c_str());
    return {.in_time = true,
            .exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1,
            .seconds = 0,
            .out = Contents(folder_.path() + "/out.txt"),
            .err = Contents(folder_.path() + "/err.txt")};
  }
  // The objects of a run that is done, in order.
  std::vector<nlohmann::json> Results(Strings arguments) const {
    arguments.insert(arguments.end(), {"--json", "--repeats", "2", "--set", "device=CPU"});
    const JobResult result = Run(2, arguments);
    EXPECT_TRUE(result.in_time && result.exit_code == 0) << result;
    std::vector<nlohmann::json> objects;
    for (const absl::string_view line : absl::StrSplit(result.out, '\n', absl::SkipEmpty())) {
      objects.push_back(nlohmann::json::parse(std::string(line), nullptr, /*allow_exceptions=*/false));
      EXPECT_TRUE(objects.back().is_object()) << line;
      EXPECT_EQ(objects.back()["ranks"], 2);
      EXPECT_EQ(objects.back()["device"], "cpu");
    }
    return objects;
  }

  const TemporaryFolder folder_;
};

TEST_F(BenchTest, GemmGivesTheRateOfItsSize) {
  const auto results = Results({"gemm", "--m", "64", "--n", "96", "--k", "32"});
  ASSERT_EQ(results.size(), 1u);
  EXPECT_EQ(results[0]["n"], 96);
  EXPECT_GT(results[0]["tflops"], 0.0);
}

// 256 queries and two heads of 16 on two ranks, and what pairs a mask leaves of them, counted here.
struct MaskCase {
  Strings options;
  double pairs;
};

TEST_F(BenchTest, AttentionCountsTheMask) {
  const MaskCase cases[] = {
      {{}, 256 * 257 / 2.0},
      {{"--mask", "causal"}, 256 * 257 / 2.0},
      {{"--mask", "full"}, 256.0 * 256},
      {{"--mask", "window", "--window", "32"}, 32 * 33 / 2.0 + 224 * 32},
      {{"--mask", "documents", "--document_length", "1"}, 256},  // every token a document
  };
  for (const MaskCase& c : cases) {
    Strings arguments = {"attention", "--length", "256", "--heads", "2", "--kv_heads", "1", "--dim", "16"};
    arguments.insert(arguments.end(), c.options.begin(), c.options.end());
    const auto results = Results(arguments);
    ASSERT_EQ(results.size(), 1u);
    const nlohmann::json& r = results[0];
    SCOPED_TRACE(r.dump());
    EXPECT_EQ(r["mask"], c.options.empty() ? "causal" : c.options[1]);
    EXPECT_EQ(r["pairs"], c.pairs);
    const double flops = 4 * c.pairs * 2 * 16 / 2;  // four a pair and dim, on two ranks
    EXPECT_NEAR(r["forward_tflops"].get<double>() * r["forward_ms"].get<double>() * 1e9, flops, 1e-6 * flops);
    EXPECT_NEAR(r["both_tflops"].get<double>() * r["both_ms"].get<double>() * 1e9, 3.5 * flops, 1e-6 * flops);
    EXPECT_EQ(r["forward_kernel"], "cpu tiles");
    EXPECT_EQ(r["backward_kernel"], "cpu tiles");
  }
}

// Drawn from the seed: as many documents as their mean says, up to the spread of the sum of that many
// geometric lengths (sqrt(4096 / 16) = 16, here six times), and others with another seed.
TEST_F(BenchTest, AttentionDrawsDocumentsOfAMeanLength) {
  const auto documents = [&](const char* seed) {
    const auto results =
        Results({"attention", "--length", "4096", "--heads", "1", "--dim", "4", "--mask", "documents",
                 "--document_length", "16", "--set", absl::StrCat("seed=", seed)});
    EXPECT_EQ(results.size(), 1u);
    EXPECT_NEAR(results[0]["documents"].get<double>(), 4096 / 16, 96);
    EXPECT_EQ(results[0]["document_length"], 16);
    return results[0]["pairs"].get<int64_t>();
  };
  const int64_t first = documents("1"), again = documents("1"), other = documents("2");
  EXPECT_EQ(first, again);
  EXPECT_NE(first, other);
  // A document of n tokens has n (n + 1) / 2 pairs; the mean square of geometric lengths of mean 16 is
  // 2 * 16 * 16 - 16, so a token sees (2 * 16 * 16 - 16 + 16) / 2 / 16 keys.
  EXPECT_NEAR(static_cast<double>(first) / 4096, 16, 4);
}

TEST_F(BenchTest, ExchangeMovesEachSizeAskedFor) {
  const auto results = Results({"exchange", "--bytes", "65536"});
  ASSERT_EQ(results.size(), 1u);
  EXPECT_EQ(results[0]["bytes"], 65536);
  EXPECT_GT(results[0]["one_way_gb_per_second"], 0.0);
}

// Both passes as predicted and as measured, and drawn; throttled links take the time of their bytes.
TEST_F(BenchTest, TimelineMeasuresTheChosenPlan) {
  const auto results =
      Results({"timeline", "--length", "256", "--heads", "2", "--dim", "16", "--mask", "full", "--choice",
               "bidirectional_kv_ring", "--throttle", "0.01", "--svg", "timeline.svg"});
  ASSERT_EQ(results.size(), 2u);
  // Half of 256 tokens of K and V, two heads of 16 in f32, from each rank to the other.
  const double link_ms = 128 * 2 * 2 * 16 * 4 / 0.01e9 * 1e3;
  for (const nlohmann::json& r : results) {
    SCOPED_TRACE(r.dump());
    EXPECT_EQ(r["pass"], &r == &results[0] ? "forward" : "backward");
    EXPECT_EQ(r["plan"], "bidirectional_kv_ring");
    EXPECT_EQ(r["transport"], "host");
    for (const char* source : {"predicted", "measured"}) {
      const nlohmann::json& times = r[source];
      EXPECT_GE(times["ms"], 0.999 * link_ms);
      EXPECT_GE(times["shorter_way_ms"], 0.999 * link_ms);
      EXPECT_GT(times["both_ways_ms"], 0.0);
      EXPECT_GE(times["shorter_way_ms"], times["both_ways_ms"]);
      EXPECT_GE(times["transfers_ms"], times["under_compute_ms"]);
      EXPECT_GE(times["ms"], times["exposed_ms"]);
    }
  }
  const std::string svg = Contents(folder_.path() + "/timeline.svg");
  for (const char* drawn : {"forward, 2 ranks: predicted ", "forward, 2 ranks: measured ",
                            "backward, 2 ranks: predicted ", "backward, 2 ranks: measured "}) {
    EXPECT_TRUE(
        absl::StrContains(svg, absl::StrCat("LINKS THROTTLED to 0.01 GB/s: bidirectional_kv_ring, ", drawn)))
        << drawn;
  }
}

// DeepSeek-V3's heads: of each token 512 + 64 elements in place of 128 (128 + 64 + 128), with the same
// results; and links throttled to the time of those bytes.
TEST_F(BenchTest, LatentMovesFewerBytes) {
  const auto results = Results({"latent", "--lengths", "8", "--throttles", "0.01"});
  std::vector<nlohmann::json> rows, sums;
  for (const nlohmann::json& r : results) (r.contains("exchange") ? rows : sums).push_back(r);
  ASSERT_EQ(sums.size(), 2u);
  for (const nlohmann::json& sum : sums) {
    SCOPED_TRACE(sum.dump());
    const bool forward = sum["pass"] == "forward";
    double bytes[2] = {}, best[2] = {1e9, 1e9};
    for (const nlohmann::json& r : rows) {
      if (r["pass"] != sum["pass"]) continue;
      SCOPED_TRACE(r.dump());
      const size_t way = r["exchange"] == "latents" ? 0 : 1;
      EXPECT_EQ(r["length_per_rank"], 8);
      EXPECT_EQ(r["throttle_gb_per_second"], 0.01);
      EXPECT_LT(r["difference_to_latents"], 1e-5);
      EXPECT_GT(r["predicted_ms"], 0.0);
      best[way] = std::min(best[way], r["measured_ms"].get<double>());
      if (!absl::StartsWith(r["plan"].get<std::string>(), "kv_ring")) continue;
      bytes[way] = r["bytes_sent"].get<double>();
      // Each way carries what the other rank needs.
      EXPECT_GE(r["measured_ms"].get<double>(), forward ? 0.999 * bytes[way] / 0.01e9 * 1e3 : 0);
    }
    EXPECT_EQ(bytes[0] * 40960, bytes[1] * 576) << "f32 on CPUs, gradients too";
    EXPECT_NEAR(sum["times_fewer_bytes"].get<double>(), 40960.0 / 576, 1e-9);
    EXPECT_NEAR(sum["times_as_fast"].get<double>(), best[1] / best[0], 1e-9);
    EXPECT_EQ(sum["auto"], "latents");
  }
}

// Plans of each pass by themselves: what is left to choose of one says nothing about the other.
TEST_F(BenchTest, PlansOfThePassesMayDiffer) {
  const Strings layer = {"plans", "--length", "128", "--heads", "2", "--dim", "16"};
  const auto plans_of = [&](const Strings& fields) {
    Strings arguments = layer;
    for (const std::string& field : fields)
      arguments.insert(arguments.end(), {"--set", absl::StrCat("parallel.exchange.", field)});
    std::map<std::string, Strings> plans;
    for (const nlohmann::json& r : Results(arguments)) {
      SCOPED_TRACE(r.dump());
      plans[r["pass"].get<std::string>()].push_back(r["plan"].get<std::string>());
      EXPECT_LE(r["waited_ms"], r["measured_ms"]);
      EXPECT_EQ(r["bytes_sent"], r["predicted_bytes"]);
      EXPECT_LT(r["difference_to_one_rank"], 1e-5);
    }
    return plans;
  };
  const auto two = plans_of({"forward.plan=KV_RING", "backward.plan=TOKEN_RING"});
  ASSERT_EQ(two.size(), 2u);
  for (const auto& [pass, kind] : {std::pair("forward", "kv_ring"), {"backward", "token_ring"}}) {
    ASSERT_EQ(two.at(pass).size(), 1u) << pass;
    EXPECT_TRUE(absl::StartsWith(two.at(pass)[0], kind)) << two.at(pass)[0];
  }
  const auto one = plans_of({"forward.plan=KV_RING", "forward.parts=2"});
  EXPECT_EQ(one.at("forward").size(), 1u);
  EXPECT_GT(one.at("backward").size(), 5u) << "all that two ranks can have";
}

// What was made with throttled links says so, whichever bench it is of, in both forms of output.
TEST_F(BenchTest, ThrottledResultsSaySo) {
  const Strings attention = {"attention", "--length", "32", "--heads", "2", "--dim", "16"};
  for (const Strings& what : {attention, Strings{"step", "--config", "c.textproto"}}) {
    EXPECT_FALSE(Results(what)[0].contains("throttle_gb_per_second")) << what[0];
    Strings throttled = what;
    throttled.insert(throttled.end(), {"--set", "parallel.exchange.throttle_gb_per_second=0.05"});
    const auto results = Results(throttled);
    ASSERT_EQ(results.size(), 1u);
    EXPECT_EQ(results[0].value("throttle_gb_per_second", 0.0), 0.05) << results[0];
    throttled.insert(throttled.end(), {"--repeats", "1", "--set", "device=CPU"});
    const JobResult text = Run(2, throttled);
    EXPECT_TRUE(absl::StartsWith(text.out, "LINKS THROTTLED to 0.05 GB/s  bench=")) << text;
  }
}

TEST_F(BenchTest, HelpOfAKindNamesItsOptions) {
  const std::string all = RunAlone({"--help"}).out, gemm = RunAlone({"gemm", "--help"}).out;
  EXPECT_TRUE(absl::StrContains(all, "annulus bench WHAT") && absl::StrContains(all, "--svg")) << all;
  EXPECT_TRUE(absl::StartsWith(gemm, "usage: annulus bench gemm [options]")) << gemm;
  for (const char* option : {"  --m ", "  --repeats ", "  --json ", "  --set "})
    EXPECT_TRUE(absl::StrContains(gemm, option)) << option << "\n" << gemm;
  EXPECT_FALSE(absl::StrContains(gemm, "--svg") || absl::StrContains(gemm, "--config")) << gemm;
}

TEST_F(BenchTest, CalibrateRefusesBeforeItMeasures) {
  const std::pair<Strings, std::string> cases[] = {
      {{"--out", "gone/m.textproto"},
       "error: --out=gone/m.textproto: expected a file that can be written: No such file or directory"},
      {{"--out", "."}, "error: --out=.: expected a file to write"},
      {{"--set", "parallel.exchange.throttle_gb_per_second=1"},
       "error: annulus calibrate: --set parallel.exchange.throttle_gb_per_second=1: "
       "parallel.exchange.throttle_gb_per_second means nothing to it: expected device"},
  };
  for (const auto& [arguments, message] : cases) {
    const JobResult result = RunAlone(arguments, "calibrate");
    EXPECT_EQ(result.exit_code, 1) << result;
    EXPECT_EQ(ErrorLines(result).size(), 1u) << result;
    EXPECT_TRUE(absl::StrContains(result.err, message)) << result;
    EXPECT_FALSE(absl::StrContains(result.err, "measuring")) << result;
  }
}

TEST_F(BenchTest, StepTrainsWithoutTheData) {
  std::filesystem::remove(folder_.path() + "/text.txt");
  const auto results = Results({"step", "--config", "c.textproto"});
  ASSERT_EQ(results.size(), 1u);
  const nlohmann::json& r = results[0];
  EXPECT_NEAR(r["tokens_per_second"].get<double>() * r["step_ms"].get<double>() / 1e3, 4 * 25, 1e-6 * 100);
  EXPECT_GT(r["loss"], 0.0);
}

TEST_F(BenchTest, ErrorsAreSaidOnce) {
  EXPECT_TRUE(
      absl::StrContains(Run(2, {"memory"}).err,
                        "expected one of gemm, attention, plans, auto, latent, timeline, exchange, step"));
  EXPECT_EQ(ErrorLines(Run(2, {"gemm", "--m", "0"})),
            (Strings{"error: --m=0: expected an integer of at least 1"}));
  for (const char* what : {"exchange", "timeline", "latent"}) {
    const JobResult alone = Run(1, {what});
    EXPECT_NE(alone.exit_code, 0);
    EXPECT_EQ(ErrorLines(alone),
              (Strings{absl::StrCat("error: ranks=1: expected at least 2 (launch/mpirun -n 2 annulus bench ",
                                    what, ")")}));
  }
}

// What ranks of a host cannot hold together is refused before any of them takes it.
TEST_F(BenchTest, RefusesMoreThanTheMemory) {
  for (const Strings& what : {Strings{"exchange", "--bytes", "1099511627776"},
                              {"timeline", "--length", "300000000"},
                              {"auto", "--lengths", "300000000"},
                              {"latent", "--lengths", "30000000"},
                              {"step", "--config", "c.textproto", "--set", "data.seq_len=300000000"}}) {
    Strings arguments = what;
    arguments.insert(arguments.end(), {"--set", "device=CPU"});
    const JobResult result = Run(2, arguments);
    EXPECT_EQ(result.exit_code, 1) << result;
    const Strings errors = ErrorLines(result);
    ASSERT_EQ(errors.size(), 1u) << result;
    const absl::string_view holds = what[0] == "step" ? "planned to hold " : "to hold at least ";
    EXPECT_TRUE(absl::StartsWith(errors[0], absl::StrCat("error: memory: a rank is ", holds))) << errors[0];
    EXPECT_TRUE(absl::StrContains(errors[0], " TiB that are available to 2 ranks on ") ||
                absl::StrContains(errors[0], " GiB that are available to 2 ranks on "))
        << errors[0];
  }
}

// Long before the first result, and not where results are read from.
TEST_F(BenchTest, SaysAtOnceWhatItMeasures) {
  Job job({.folder = folder_.path(),
           .ranks = 1,
           .arguments = {"bench", "attention", "--length", "4000000", "--heads", "1", "--dim", "2", "--json",
                         "--set", "device=CPU"}});
  const auto said = [&] {
    return absl::StrContains(Contents(folder_.path() + "/err.txt"),
                             "measuring attention over 4000000 tokens: 64 TFLOP forward, 160 backward, "
                             "--repeats 10, 1 rank\n");
  };
  EXPECT_TRUE(job.WaitWhileRunning(said, 20)) << Contents(folder_.path() + "/err.txt");
  EXPECT_EQ(Contents(folder_.path() + "/out.txt"), "");
}

// Every case of the grid, in order of length, then what they amount to.
TEST_F(BenchTest, AutoIsComparedWithTheFastestOfEveryCase) {
  const auto results = Results({"auto", "--lengths", "60,24", "--heads", "2/2,2/1", "--dim", "4", "--masks",
                                "causal,documents", "--throttles", "0,2", "--document_length", "7"});
  ASSERT_EQ(results.size(), 2u * 2 * 2 * 2 + 1);
  double worst = 0, good = 0;
  for (size_t i = 0; i + 1 < results.size(); ++i) {
    const nlohmann::json& r = results[i];
    SCOPED_TRACE(r.dump());
    EXPECT_EQ(r["length"], i < 8 ? 24 : 60);
    EXPECT_EQ(r["kv_heads"], i / 4 % 2 == 0 ? 2 : 1);
    EXPECT_EQ(r["mask"], i / 2 % 2 == 0 ? "causal" : "documents");
    EXPECT_EQ(r["throttle_gb_per_second"], i % 2 == 0 ? 0.0 : 2.0);
    double chosen = 0, fastest = 0;
    for (const char* pass : {"forward", "backward"}) {
      const nlohmann::json& p = r[pass];
      EXPECT_GE(p["ratio"], 1.0);
      EXPECT_GT(p["timed"], 1);
      EXPECT_GE(p["timed"].get<int>() + p["same"].get<int>() + p["not_timed"].get<int>(), 8)
          << "all plans of two ranks, some also in parts";
      // Of plans predicted to be within 2% of the fastest, AUTO takes the one that waits least.
      EXPECT_LE(p["auto"]["predicted_ms"], p["fastest"]["predicted_ms"].get<double>() * 1.021);
      chosen += p["auto"]["measured_ms"].get<double>();
      fastest += p["fastest"]["measured_ms"].get<double>();
    }
    EXPECT_NEAR(r["ratio"].get<double>(), chosen / fastest, 1e-9);
    worst = std::max(worst, r["ratio"].get<double>());
    good += r["ratio"] <= 1.05;
  }
  EXPECT_EQ(results.back()["cases"], 16);
  EXPECT_EQ(results.back()["worst_ratio"], worst);
  EXPECT_NEAR(results.back()["within_5_percent"].get<double>(), good / 16, 1e-9);
}

TEST_F(BenchTest, AutoSaysWhatIsNotTimed) {
  const Strings arguments = {"auto",    "--lengths", "24",        "--heads", "2/1",   "--dim",     "4",
                             "--masks", "full",      "--repeats", "1",       "--set", "device=CPU"};
  const JobResult some = Run(2, arguments);
  EXPECT_TRUE(absl::StrContains(some.out, "are not timed (--all: are)")) << some;
  EXPECT_TRUE(absl::StrContains(some.out, "AUTO within 5% of the fastest in ")) << some;
  Strings with_all = arguments;
  with_all.emplace_back("--all");
  const JobResult all = Run(2, with_all);
  EXPECT_FALSE(absl::StrContains(all.out, "not timed")) << all;
}

// Whatever is wrong with the options is said by name, with what was expected, and nothing is measured.
TEST_F(BenchTest, RefusesWhatItCannotUse) {
  const std::pair<Strings, std::string> cases[] = {
      {{"gemm", "--heads", "3"},
       "annulus bench gemm: --heads means nothing to it: expected one of --m, --n, --k, --repeats, --json, "
       "--set"},
      {{"gemm", "--config", "c.textproto"}, "annulus bench gemm: --config means nothing to it"},
      {{"exchange", "--length", "8"}, "annulus bench exchange: --length means nothing to it"},
      {{"step", "--config", "c.textproto", "--m", "8"}, "annulus bench step: --m means nothing to it"},
      {{"step"}, "annulus bench step: expected --config FILE"},
      {{"gemm", "--set", "parallel.layout=ZIGZAG"},
       "--set parallel.layout=ZIGZAG: parallel.layout means nothing to it: expected one of device, compute"},
      {{"attention", "--set", "optim.steps=3"}, "optim.steps means nothing to it"},
      {{"plans", "--set", "parallel.cp=1"},
       "annulus bench plans: --set parallel.cp=1: parallel.cp means nothing to it: expected one of device, "
       "compute, deterministic, attention_kernel, seed, parallel.layout, parallel.exchange"},
      {{"plans", "--svg", "gone/x.svg"},
       "--svg=gone/x.svg: expected a file that can be written: No such file or directory"},
      {{"attention", "--set", "parallelism=3"}, "parallelism means nothing to it"},
      {{"gemm", "--repeats", "0"}, "--repeats=0: expected an integer of at least 1"},
      {{"gemm", "--repeats", "4294967297"}, "--repeats=4294967297: expected an integer of at most 1000000"},
      {{"exchange", "--bytes", "1e6"}, "--bytes=1e6: expected an integer of at least 1"},
      {{"exchange", "--bytes", "1"}, "--bytes=1: expected at least 2, half for each neighbour"},
      {{"exchange", "--bytes", "1099511627777"},
       "--bytes=1099511627777: expected an integer of at most 1099511627776"},
      {{"gemm", "--m", "1000000", "--set", "device=CPU"}, "available to 1 rank on "},
      {{"gemm", "--m", "1000000", "--set", "device=CPU"}, ": lower --m, --n or --k"},
      {{"attention", "--length", "300000000", "--set", "device=CPU"},
       ": fewer tokens, heads or dims, or more ranks"},
      {{"plans", "--length", "300000000", "--set", "device=CPU"},
       ": fewer tokens, heads or dims, or more ranks"},
      {{"gemm", "--m", "4294967296", "--n", "4294967296"},
       "--m, --k: 4294967296 x 4294967296 elements: expected at most 1099511627776"},
      {{"attention", "--length", "-5"}, "--length=-5: expected an integer of at least 1"},
      {{"attention", "--length", "99999999999999999999"},
       "--length=99999999999999999999: expected an integer of at most 2147483648"},
      {{"attention", "--length", "2147483648"},
       "--length, --heads, --dim: 2147483648 x 16 x 128 elements: expected at most 1099511627776"},
      {{"attention", "--heads", "6", "--kv_heads", "4"}, "--kv_heads=4: expected a divisor of --heads=6"},
      {{"auto", "--heads", "16/3"}, "--heads=16/3: expected H or H/KV, heads and KV heads that divide them"},
      {{"auto", "--lengths", "8,x"}, "--lengths=x: expected integers from 1 to 2147483648"},
      {{"auto", "--masks", "causal,window"}, "--masks=window: expected causal, full, documents"},
      {{"auto", "--throttles", "-1"}, "--throttles=-1: expected rates from 0 (full speed) to 1e6 GB/s"},
      {{"latent", "--kv_heads", "8"}, "annulus bench latent: --kv_heads means nothing to it"},
      {{"latent", "--latent_dim", "0"}, "--latent_dim=0: expected an integer of at least 1"},
      {{"auto", "--length", "8"}, "annulus bench auto: --length means nothing to it"},
      {{"attention", "--mask", "ring"}, "--mask=ring: expected one of causal, full, window, documents"},
      {{"attention", "--mask", "window"}, "--mask=window: expected --window N"},
      {{"attention", "--mask", "window", "--window", "x"}, "--window=x: expected an integer of at least 1"},
      {{"attention", "--window", "4"},
       "--window=4: means nothing with --mask=causal: expected --mask window"},
      {{"attention", "--mask", "full", "--document_length", "4"},
       "--document_length=4: means nothing with --mask=full: expected --mask documents"},
  };
  for (const auto& [arguments, message] : cases) {
    const JobResult result = RunAlone(arguments);
    EXPECT_EQ(result.exit_code, 1) << result;
    EXPECT_EQ(ErrorLines(result).size(), 1u) << result;
    EXPECT_TRUE(absl::StrContains(result.err, message)) << message << "\n" << result;
    EXPECT_EQ(result.out, "");
  }
}

}  // namespace
}  // namespace annulus::testing
