// Pages and tables of studies and runs: whole, self-contained, with every number, and readable without color.

#include "annulus/study/report.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <limits>

#include "absl/strings/str_split.h"
#include "annulus/base/file.h"
#include "annulus/train/report.h"
#include "study/page_check.h"
#include "study/report_results.h"

namespace annulus::testing {
namespace {

bool Has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

int64_t CountOf(const std::string& text, const std::string& part) {
  int64_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

TEST(PageCheck, FindsWhatIsWrong) {
  const std::string page = StudyHtml(MadeUpStudy({1, 2}, {8192}, {"AUTO"}));
  ASSERT_EQ(FlawOf(page), "");
  const auto broken = [&](const std::string& from, const std::string& to) {
    std::string text = page;
    const size_t at = text.rfind(from);
    EXPECT_NE(at, std::string::npos) << from;
    return FlawOf(text.replace(at, from.size(), to));
  };
  EXPECT_NE(broken("</td>", ""), "");
  EXPECT_NE(broken("</section>", "</div>"), "");
  EXPECT_NE(broken("</caption>", "& </caption>"), "");
  EXPECT_NE(broken("</caption>", "</caption><img src=\"a.png\"/>"), "");
  EXPECT_NE(broken("</caption>", "</caption><a href=\"http://a.b\"></a>"), "");
  EXPECT_NE(broken("</style>", "@import 'a.css';</style>"), "");
  EXPECT_NE(broken("</body>", "<script>1</script></body>"), "");
}

TEST(StudyHtml, IsAWholePageOfItsOwn) {
  for (const std::vector<int64_t>& ranks :
       std::vector<std::vector<int64_t>>{{1}, {8}, {1, 2, 4, 8, 64, 4096}}) {
    for (const std::vector<int64_t>& seq_lens :
         std::vector<std::vector<int64_t>>{{8192}, {8192, 16384, 32768, 65536, 131072}}) {
      const std::string page = StudyHtml(MadeUpStudy(ranks, seq_lens, {"AUTO", "KV_RING"}));
      EXPECT_EQ(FlawOf(page), "");
      EXPECT_TRUE(Has(page, "prefers-color-scheme:dark"));
      EXPECT_TRUE(Has(page, "@media print"));
    }
  }
}

TEST(StudyHtml, HasTheNumbersOfEveryPoint) {
  const StudyResults results = MadeUpStudy({1, 2, 4, 8, 64}, {8192, 32768}, {"AUTO"});
  const std::string page = StudyHtml(results);
  for (const PointResult& point : results.points) {
    EXPECT_TRUE(Has(page, ">" + point.point.id + "<")) << point.point.id;
    for (const auto& figures : {point.measured, point.predicted}) {
      if (!figures.has_value()) continue;
      const double bytes = static_cast<double>(figures->memory.total() + figures->other_memory_bytes);
      EXPECT_TRUE(Has(page, ">" + FormatCount(figures->tokens_per_second) + "<")) << point.point.id;
      EXPECT_TRUE(Has(page, ">" + FormatBytes(bytes) + "<")) << point.point.id;
      EXPECT_TRUE(Has(page, ">" + FormatBytes(static_cast<double>(figures->bytes_inside_hosts)) + "<"));
    }
  }
}

TEST(StudyHtml, DrawsMeasuredAndSimulatedInDifferentForms) {
  StudyResults results = MadeUpStudy({1, 2, 4, 8, 64}, {8192}, {"AUTO"});
  const std::string both = StudyHtml(results);
  for (const char* shape : {"dot ", "line ", "bar "}) {
    EXPECT_TRUE(Has(both, std::string("class=\"") + shape + "measured c0\"")) << shape;
    EXPECT_TRUE(Has(both, std::string("class=\"") + shape + "simulated c0\"")) << shape;
  }
  EXPECT_TRUE(Has(both, ".line.simulated{stroke-dasharray"));
  EXPECT_TRUE(Has(both, ".dot.simulated{fill:var(--page)}"));
  for (PointResult& point : results.points) point.predicted.reset();
  const std::string measured = StudyHtml(results);
  EXPECT_FALSE(Has(measured, "simulated c"));
  EXPECT_FALSE(Has(measured, "Predicted against measured"));
}

TEST(StudyHtml, EveryChartHasATitleADescriptionAndATable) {
  const std::string page = StudyHtml(MadeUpStudy({1, 2, 4, 64}, {8192}, {"AUTO"}));
  const int64_t charts = CountOf(page, "<svg class=\"chart\"");
  EXPECT_GE(charts, 8);
  EXPECT_EQ(CountOf(page, "<desc>"), charts);
  EXPECT_EQ(CountOf(page, "role=\"img\""), charts);
  EXPECT_GE(CountOf(page, "<table>"), charts);
  EXPECT_EQ(CountOf(page, "<caption>"), CountOf(page, "<table>"));
}

// Twelve series are too many for a chart.
TEST(StudyHtml, ManySeriesGetAChartForEachValueOfTheFirstAxis) {
  const std::string one = StudyHtml(MadeUpStudy({1, 2, 4}, {8192, 16384, 32768, 65536}, {"AUTO", "KV_RING"}));
  EXPECT_EQ(CountOf(one, "<title>Throughput"), 1);
  const std::string page =
      StudyHtml(MadeUpStudy({1, 2, 4}, {8192, 16384, 32768, 65536, 131072, 262144}, {"AUTO", "KV_RING"}));
  EXPECT_EQ(CountOf(page, "<title>Throughput, seq_len "), 6);
  EXPECT_TRUE(Has(page, "<figcaption>seq_len 262144</figcaption>"));
}

TEST(StudyHtml, SaysHowFarPredictionsAreOff) {
  StudyResults results = MadeUpStudy({1, 2, 4}, {8192}, {"AUTO"});
  const double errors[] = {0.02, -0.04, 0.12};
  for (size_t i = 0; i < 3; ++i) {
    PointResult& point = results.points[i];
    point.state = PointState::kDone;
    point.measured = point.predicted = MadeUpFigures(point.point.ranks, 8192, 1);
    point.predicted->step_seconds *= 1 + errors[i];
  }
  const std::string page = StudyHtml(results);
  EXPECT_TRUE(Has(page, "Step time: off by 4.0% in the median and 12.0% at worst (4 ranks), of 3 points."));
  EXPECT_TRUE(Has(page, "Memory: off by 0.0% in the median"));
  for (const char* text : {">+2.0%<", ">-4.0%<", ">+12.0%<"}) EXPECT_TRUE(Has(page, text)) << text;
  EXPECT_TRUE(Has(page, ">exact</text>"));
  EXPECT_TRUE(Has(page, ">+10%</text>"));
}

TEST(StudyHtml, EfficiencyIsThatOfARankAgainstTheFirstPoint) {
  StudyResults results = MadeUpStudy({1, 4}, {8192}, {"AUTO"});
  for (PointResult& point : results.points) {
    point.predicted.reset();
    point.measured->tokens_per_second = point.point.ranks == 1 ? 1000 : 3000;
  }
  const std::string page = StudyHtml(results);
  EXPECT_TRUE(Has(page, "Strong scaling efficiency"));
  EXPECT_TRUE(Has(page, ">75.0%<"));
  results.scaling = Scaling::kWeak;
  EXPECT_TRUE(Has(StudyHtml(results), "Weak scaling efficiency"));
}

TEST(StudyHtml, EscapesAllText) {
  StudyResults results = MadeUpStudy({1, 2, 4}, {8192}, {"<b>&\"'"});
  results.name = "<script>alert(1)</script>";
  results.points[0].layout = "</table>";
  results.points[0].measured->plans = {"a < b & c"};
  const std::string page = StudyHtml(results);
  EXPECT_EQ(FlawOf(page), "");
  EXPECT_TRUE(Has(page, "&lt;script&gt;alert(1)&lt;/script&gt;"));
  EXPECT_TRUE(Has(page, "a &lt; b &amp; c"));
  EXPECT_TRUE(Has(page, "out of memory: 152.1 GiB of 141.0 GiB &lt;planned &amp; &quot;held&quot;&gt;"));
}

TEST(StudyHtml, EmptyAllFailedAndNotFinite) {
  EXPECT_EQ(FlawOf(StudyHtml(StudyResults())), "");
  StudyResults failed = MadeUpStudy({1, 2, 4}, {8192}, {"AUTO"});
  for (PointResult& point : failed.points) {
    point.state = PointState::kFailed;
    point.measured.reset();
    point.predicted.reset();
    point.reason = "no reason at all";
  }
  const std::string page = StudyHtml(failed);
  EXPECT_EQ(FlawOf(page), "");
  EXPECT_EQ(CountOf(page, "no reason at all"), 3);
  EXPECT_FALSE(Has(page, "class=\"chart\""));

  StudyResults odd = MadeUpStudy({1, 2, 4, 8}, {8192}, {"AUTO"});
  odd.points[2].measured->tokens_per_second = std::numeric_limits<double>::quiet_NaN();
  odd.points[2].measured->step_seconds = std::numeric_limits<double>::infinity();
  odd.points[3].predicted->mfu_causal = -std::numeric_limits<double>::infinity();
  odd.points[0].measured = StepFigures{};
  const std::string odd_page = StudyHtml(odd);
  EXPECT_EQ(FlawOf(odd_page), "");
  EXPECT_TRUE(Has(odd_page, ">NaN<"));
  EXPECT_FALSE(Has(odd_page, "nan,"));
  EXPECT_FALSE(Has(odd_page, "=\"nan"));
  EXPECT_FALSE(Has(odd_page, "=\"inf"));
}

std::vector<std::string> LinesOf(const std::string& csv) {
  std::vector<std::string> lines = absl::StrSplit(csv, "\r\n");
  EXPECT_EQ(lines.back(), "");
  lines.pop_back();
  return lines;
}

TEST(StudyCsv, OneRowAPointAndStableColumns) {
  const StudyResults results = MadeUpStudy({1, 2, 64}, {8192}, {"AUTO"});
  const std::vector<std::string> lines = LinesOf(StudyCsv(results));
  ASSERT_EQ(lines.size(), 4u);
  EXPECT_EQ(
      lines[0].rfind("study,device,profile,scaling,id,axis_gpus,axis_data.seq_len,"
                     "axis_parallel.exchange.plan,overrides,ranks,hosts,layout,tokens_per_step,state,reason,"
                     "measured_step_seconds,",
                     0),
      0u);
  const std::vector<std::string> names = absl::StrSplit(lines[0], ',');
  const std::vector<std::string> fields = absl::StrSplit(lines[3], ',');
  ASSERT_EQ(fields.size(), names.size());
  const auto field = [&](const std::string& name) {
    const auto at = std::find(names.begin(), names.end(), name);
    EXPECT_NE(at, names.end()) << name;
    return fields[static_cast<size_t>(at - names.begin())];
  };
  const PointResult& point = results.points[2];
  EXPECT_EQ(field("ranks"), "64");
  EXPECT_EQ(field("state"), "done");
  EXPECT_EQ(field("measured_step_seconds"), "");
  EXPECT_NEAR(std::stod(field("predicted_step_seconds")), point.predicted->step_seconds, 1e-9);
  EXPECT_EQ(field("predicted_memory_total_bytes"),
            absl::StrCat(point.predicted->memory.total() + point.predicted->other_memory_bytes));
  EXPECT_EQ(field("goodput_failures"), "4");
}

TEST(StudyCsv, QuotesAsTheStandardSays) {
  StudyResults results = MadeUpStudy({1, 2, 4}, {8192}, {"AUTO"});
  results.points.resize(2);
  results.points[1].reason = "a,b \"c\"\nd";
  EXPECT_TRUE(Has(StudyCsv(results), ",failed,\"a,b \"\"c\"\"\nd\","));
  EXPECT_EQ(LinesOf(StudyCsv(StudyResults())).size(), 1u);
}

class RunReport : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ =
        ::testing::TempDir() + "report_" + ::testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::remove_all(folder_);
    ASSERT_TRUE(MakeDirectories(folder_).ok());
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  void Write(const std::string& name, const std::string& text) {
    ASSERT_TRUE(WriteFileDurably(folder_ + "/" + name, text).ok());
  }
  static std::string Line(int64_t step) {
    StepReport report{.step = step,
                      .loss = 2 + 3.0 / static_cast<double>(step),
                      .grad_norm = 0.5,
                      .lr = 1e-3,
                      .tokens = 4096,
                      .step_ms = 100 + static_cast<double>(step % 7),
                      .tokens_per_second = 40960,
                      .tflops_causal = 1.5,
                      .tflops_full = 1.75,
                      .exposed_exchange_ms = 7,
                      .exposed_reduce_ms = 3,
                      .memory_peak_bytes = 64 << 20};
    report.memory.parameters = 10 << 20;
    AttentionReport& attention = report.attention.emplace_back();
    attention.plan = "kv_ring";
    attention.predicted_ms = 9;
    attention.measured_ms = 10;
    std::optional<Evaluation> evaluation;
    if (step % 10 == 0) evaluation = Evaluation{.loss = 2.5};
    return MetricsJson(report, evaluation);
  }
  static std::string Lines(int64_t steps) {
    std::string text;
    for (int64_t step = 1; step <= steps; ++step) text += Line(step);
    return text;
  }

  std::string folder_;
};

TEST_F(RunReport, ShowsTheRun) {
  Write("metrics.jsonl", Lines(20));
  Write("events.jsonl",
        "{\"time\":\"2026-01-01T00:00:00Z\",\"event\":\"start\",\"step\":0,\"detail\":\"4 ranks\"}\n"
        "{\"time\":\"2026-01-01T00:00:09Z\",\"event\":\"stopped\",\"step\":20,\"detail\":\"<signal>\"}\n");
  const absl::StatusOr<std::string> page = RunHtml(folder_);
  ASSERT_TRUE(page.ok()) << page.status();
  EXPECT_EQ(FlawOf(*page), "");
  for (const char* text :
       {"Loss against steps", "Loss against tokens", "Gradient norm", "Learning rate", "Tokens a second",
        "Time of a step", "Memory of a rank", ">5.0000<", ">2.5000<", "kv_ring", ">-10.0%<",
        ">stopped</text>", "&lt;signal&gt;", "class=\"line simulated"}) {
    EXPECT_TRUE(Has(*page, text)) << text;
  }
  EXPECT_EQ(CountOf(*page, "<desc>"), CountOf(*page, "class=\"chart\""));
}

TEST_F(RunReport, ALastLineThatIsCutOffIsLeftOut) {
  Write("metrics.jsonl", Lines(3) + Line(4).substr(0, 30));
  const absl::StatusOr<std::string> csv = RunCsv(folder_);
  ASSERT_TRUE(csv.ok()) << csv.status();
  EXPECT_EQ(LinesOf(*csv).size(), 4u);
  EXPECT_TRUE(RunHtml(folder_).ok());
}

TEST_F(RunReport, NamesWhatIsMissingOrBroken) {
  EXPECT_TRUE(absl::IsNotFound(RunHtml(folder_).status()));
  EXPECT_TRUE(Has(std::string(RunCsv(folder_).status().message()), "metrics.jsonl"));
  Write("metrics.jsonl", Line(1) + "{\"step\":2,\n" + Line(3));
  EXPECT_TRUE(absl::IsInvalidArgument(RunHtml(folder_).status()));
  EXPECT_TRUE(Has(std::string(RunHtml(folder_).status().message()), "metrics.jsonl:2: "));
  Write("metrics.jsonl", Line(1) + "{\"loss\":2}\n");
  EXPECT_TRUE(Has(std::string(RunHtml(folder_).status().message()), "metrics.jsonl:2: step: "));
  Write("metrics.jsonl", "");
  const absl::StatusOr<std::string> page = RunHtml(folder_);
  ASSERT_TRUE(page.ok()) << page.status();
  EXPECT_EQ(FlawOf(*page), "");
}

TEST_F(RunReport, NumbersThatAreNotFiniteAreSaidNotDrawn) {
  Write("metrics.jsonl",
        Lines(2) + "{\"step\":3,\"loss\":\"nan\",\"grad_norm\":\"inf\",\"skipped\":true}\n" + Line(4));
  const absl::StatusOr<std::string> page = RunHtml(folder_);
  ASSERT_TRUE(page.ok()) << page.status();
  EXPECT_EQ(FlawOf(*page), "");
  EXPECT_TRUE(Has(*page, "1 step skipped or not finite"));
  EXPECT_TRUE(Has(*page, "left as they were"));
  EXPECT_TRUE(Has(*page, ">NaN<"));
  EXPECT_FALSE(Has(*page, "nan,"));
  const absl::StatusOr<std::string> csv = RunCsv(folder_);
  ASSERT_TRUE(csv.ok());
  EXPECT_EQ(LinesOf(*csv)[3].rfind("3,nan,inf,", 0), 0u);
}

TEST_F(RunReport, StepsDoneAgainReplaceThoseOfBefore) {
  Write("metrics.jsonl", Lines(5) + Line(3) + Line(4));
  const absl::StatusOr<std::string> csv = RunCsv(folder_);
  ASSERT_TRUE(csv.ok());
  const std::vector<std::string> lines = LinesOf(*csv);
  ASSERT_EQ(lines.size(), 5u);
  EXPECT_EQ(lines[4].rfind("4,", 0), 0u);
}

// One step of 100,000 stands out: its value stays in the band.
TEST_F(RunReport, LongRunsAreThinnedAndKeepTheirExtremes) {
  std::string text = Lines(50000) + "{\"step\":50001,\"loss\":2.0,\"grad_norm\":777.25}\n";
  for (int64_t step = 50002; step <= 100000; ++step) text += Line(step);
  Write("metrics.jsonl", text);
  std::string events;
  for (int step = 500; step <= 100000; step += 500) {
    absl::StrAppend(&events, "{\"time\":\"t", step, "\",\"event\":\"checkpoint\",\"step\":", step, "}\n");
  }
  Write("events.jsonl", events);
  const absl::StatusOr<std::string> page = RunHtml(folder_);
  ASSERT_TRUE(page.ok()) << page.status();
  EXPECT_EQ(FlawOf(*page), "");
  EXPECT_LT(page->size(), size_t{1} << 20);
  EXPECT_TRUE(Has(*page, "to 777.2"));
  EXPECT_TRUE(Has(*page, "class=\"band c0\""));
  EXPECT_TRUE(Has(*page, "200 checkpoints"));
}

}  // namespace
}  // namespace annulus::testing
