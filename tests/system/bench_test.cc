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

TEST_F(BenchTest, AttentionCountsTheMask) {
  const auto results = Results(
      {"attention", "--length", "256", "--heads", "2", "--kv_heads", "1", "--dim", "16", "--window", "32"});
  ASSERT_EQ(results.size(), 1u);
  const nlohmann::json& r = results[0];
  // 256 queries, of which those after the first 32 see 32 keys, on two ranks; four FLOPs a pair and dim.
  const double pairs = 32 * 33 / 2.0 + 224 * 32;
  const double flops = 4 * pairs * 2 * 16 / 2;
  EXPECT_NEAR(r["forward_tflops"].get<double>() * r["forward_ms"].get<double>() * 1e9, flops, 1e-6 * flops);
  EXPECT_NEAR(r["both_tflops"].get<double>() * r["both_ms"].get<double>() * 1e9, 3.5 * flops, 1e-6 * flops);
  EXPECT_EQ(r["kernel"], "cpu tiles");
}

TEST_F(BenchTest, ExchangeMovesEachSizeAskedFor) {
  const auto results = Results({"exchange", "--bytes", "65536"});
  ASSERT_EQ(results.size(), 1u);
  EXPECT_EQ(results[0]["bytes"], 65536);
  EXPECT_GT(results[0]["one_way_gb_per_second"], 0.0);
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
  EXPECT_TRUE(absl::StrContains(Run(2, {"memory"}).err, "expected one of gemm, attention, exchange, step"));
  const JobResult alone = Run(1, {"exchange"});
  EXPECT_NE(alone.exit_code, 0);
  EXPECT_EQ(ErrorLines(alone),
            (Strings{"error: ranks=1: expected at least 2 (launch/mpirun -n 2 annulus bench "
                     "exchange)"}));
}

}  // namespace
}  // namespace annulus::testing
