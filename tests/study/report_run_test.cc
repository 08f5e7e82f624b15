// Pages and tables of runs: from whole and broken files, short and long.

#include <gtest/gtest.h>

#include <filesystem>
#include <optional>

#include "annulus/base/file.h"
#include "annulus/study/report.h"
#include "annulus/train/report.h"
#include "study/page_check.h"

namespace annulus::testing {
namespace {

class RunPage : public ::testing::Test {
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

TEST_F(RunPage, ShowsTheRun) {
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

TEST_F(RunPage, ALastLineThatIsCutOffIsLeftOut) {
  Write("metrics.jsonl", Lines(3) + Line(4).substr(0, 30));
  const absl::StatusOr<std::string> csv = RunCsv(folder_);
  ASSERT_TRUE(csv.ok()) << csv.status();
  EXPECT_EQ(LinesOf(*csv).size(), 4u);
  EXPECT_TRUE(RunHtml(folder_).ok());
}

TEST_F(RunPage, NamesWhatIsMissingOrBroken) {
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

TEST_F(RunPage, NumbersThatAreNotFiniteAreSaidNotDrawn) {
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

TEST_F(RunPage, StepsDoneAgainReplaceThoseOfBefore) {
  Write("metrics.jsonl", Lines(5) + Line(3) + Line(4));
  const absl::StatusOr<std::string> csv = RunCsv(folder_);
  ASSERT_TRUE(csv.ok());
  const std::vector<std::string> lines = LinesOf(*csv);
  ASSERT_EQ(lines.size(), 5u);
  EXPECT_EQ(lines[4].rfind("4,", 0), 0u);
}

// One step of 100,000 stands out: its value stays in the band.
TEST_F(RunPage, LongRunsAreThinnedAndKeepTheirExtremes) {
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
