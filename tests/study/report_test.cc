// Pages and tables of studies: whole, self-contained, with every number, and readable without color.

#include "annulus/study/report.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <limits>

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "annulus/base/file.h"
#include "annulus/study/study_run.h"
#include "annulus/train/report.h"
#include "annulus/train/study_config.h"
#include "study/page_check.h"
#include "study/report_results.h"
#include "study/study_test_config.h"

namespace annulus::testing {
namespace {

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

TEST(StudyHtml, NamesEveryDeviceThatTookPart) {
  StudyResults results = MadeUpStudy({1, 2, 4, 64}, {8192}, {"AUTO"});
  results.points[2].machine = {.device = "NVIDIA H100", .measured = false, .memory_bytes = int64_t{80} << 30};
  results.points[2].measured_on = "4 x NVIDIA H100";
  const std::string page = StudyHtml(results);
  EXPECT_EQ(FlawOf(page), "");
  EXPECT_TRUE(Has(page, " Machines: NVIDIA H200 (measured profile); NVIDIA H100 (assumed profile)."));
  EXPECT_TRUE(Has(page, "medians over steps, on 1 x NVIDIA H200 (1 point); 4 x NVIDIA H100 (1 point)."));
  EXPECT_TRUE(Has(page, "<td>4 x NVIDIA H100; predicted for NVIDIA H100</td>"));
  EXPECT_FALSE(Has(page, "a rank has 141.0 GiB")) << "not all have";
  const std::vector<std::string> lines = LinesOf(StudyCsv(results));
  EXPECT_TRUE(absl::StartsWith(lines[1], "dense 7B,NVIDIA H200,measured,")) << lines[1];
  EXPECT_TRUE(absl::StartsWith(lines[3], "dense 7B,NVIDIA H100,assumed,")) << lines[3];
  EXPECT_TRUE(Has(lines[3], ",4 x NVIDIA H100,")) << lines[3];

  const std::string one = StudyHtml(MadeUpStudy({1, 2, 4, 64}, {8192}, {"AUTO"}));
  EXPECT_TRUE(Has(one, " Machine: NVIDIA H200 (measured profile)."));
  EXPECT_TRUE(Has(one, "a rank has 141.0 GiB"));
  for (PointResult& point : results.points) point.measured_on.clear();
  EXPECT_TRUE(Has(StudyHtml(results), "on devices that the runs do not name."));
}

TEST(StudyHtml, SaysWhatMaskedDocumentsWerePricedAs) {
  StudyResults results = MadeUpStudy({1, 2, 4}, {8192}, {"AUTO"});
  EXPECT_FALSE(Has(StudyHtml(results), "documents"));
  results.points[0].predicted->documents = "documents priced as whole sequences: a.txt: not there";
  EXPECT_TRUE(Has(StudyHtml(results),
                  "<td>measured, simulated; documents priced as whole sequences: a.txt: not there</td>"));
}

// Zero bytes of a measured run are bytes that were not counted.
TEST(StudyHtml, BytesAreThoseOfPointsThatCountThem) {
  StudyResults results = MadeUpStudy({1, 2, 4}, {8192}, {"AUTO"});
  const int64_t counted = CountOf(StudyHtml(results), ">measured</td>");
  for (PointResult& point : results.points) {
    if (point.measured.has_value()) point.measured->bytes_inside_hosts = 0;
  }
  EXPECT_EQ(CountOf(StudyHtml(results), ">measured</td>"), counted - 2);
  for (PointResult& point : results.points) point.predicted.reset();
  EXPECT_FALSE(Has(StudyHtml(results), "Bytes sent"));
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

TEST(StudyHtml, OneRankCountIsDrawnAsBars) {
  const std::string page = StudyHtml(MadeUpStudy({8}, {8192, 32768}, {"AUTO", "KV_RING"}));
  EXPECT_EQ(FlawOf(page), "");
  EXPECT_FALSE(Has(page, "class=\"dot measured c0\"><title>seq_len"));
  EXPECT_FALSE(Has(page, "scaling efficiency"));
  EXPECT_TRUE(
      Has(page, "<text class=\"bar-label\" x=\"6\" y=\"21\">8 ranks, seq_len 8192, plan AUTO</text>"));
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

// Two cases of four layouts each: of the first the planner takes the best, of the second one that is 5%
// slower, and best is one that it thinks slow.
StudyResults Layouts() {
  StudyResults results;
  const double measured[2][4] = {{1.0, 1.2, 1.1, 1.3}, {2.1, 2.0, 2.4, 2.2}};
  const double predicted[2][4] = {{0.9, 1.0, 1.1, 1.2}, {1.9, 2.0, 2.1, 2.2}};
  for (int model = 0; model < 2; ++model) {
    for (int layout = 0; layout < 4; ++layout) {
      PointResult& point = results.points.emplace_back();
      point.point.id = absl::StrCat(model, "-", layout);
      point.point.labels = {{"recompute", layout < 2 ? "NONE" : "ALL"},
                            {"model", absl::StrCat("m", model)},
                            {"cp", absl::StrCat(1 + layout % 2)}};
      point.state = PointState::kDone;
      point.tokens_per_step = 100;
      point.measured = point.predicted = MadeUpFigures(4, 8192, 1);
      point.measured->step_seconds = measured[model][layout];
      point.predicted->step_seconds = predicted[model][layout];
    }
  }
  return results;
}

std::string ChoicesIn(const StudyResults& results) {
  const std::vector<std::string> findings = StudyFindings(results);
  return !findings.empty() && Has(findings.back(), "planner") ? findings.back() : "";
}

TEST(StudyChoices, PointsThatDifferInTheirLayoutAloneAreOneCase) {
  StudyResults results = Layouts();
  EXPECT_EQ(ChoicesIn(results),
            "planner's choice against the best measured layout: 2.5% slower in the median and 5.0% at worst "
            "(model m1), of 2 cases");
  const std::string page = StudyHtml(results);
  EXPECT_EQ(FlawOf(page), "");
  EXPECT_TRUE(Has(page, "<td>recompute NONE, cp 1</td>")) << page;
  const std::vector<std::string> lines = LinesOf(StudyCsv(results));
  EXPECT_TRUE(absl::EndsWith(lines[0], ",layout_choice,layout_slower_by")) << lines[0];
  EXPECT_TRUE(absl::EndsWith(lines[1], ",planner best,0")) << lines[1];
  EXPECT_TRUE(absl::EndsWith(lines[2], ",,")) << lines[2];
  EXPECT_TRUE(absl::EndsWith(lines[5], ",planner,0.05")) << lines[5];
  EXPECT_TRUE(absl::EndsWith(lines[6], ",best,")) << lines[6];
  // What is predicted not to fit is not chosen, what has not been measured yet is no case.
  results.points[4].predicted.reset();
  EXPECT_TRUE(Has(ChoicesIn(results), " 0.0% at worst (model m0), of 2 cases")) << ChoicesIn(results);
  results = Layouts();
  results.points[4].measured.reset();
  EXPECT_TRUE(Has(ChoicesIn(results), ", of 1 case")) << ChoicesIn(results);
  results.points[4].state = PointState::kFailed;
  EXPECT_TRUE(Has(ChoicesIn(results), " and inf at worst (model m1), of 2 cases")) << ChoicesIn(results);
}

TEST(StudyChoices, WithoutLayoutsToChooseFromThereAreNone) {
  const StudyResults results = MadeUpStudy({1, 2, 4}, {8192, 32768}, {"AUTO"});
  EXPECT_EQ(ChoicesIn(results), "");
  EXPECT_FALSE(Has(StudyHtml(results), "Planner&#39;s choice"));
  EXPECT_TRUE(Has(StudyHtml(Layouts()), "Planner&#39;s choice"));
}

// With weak scaling more replicas do more work in a step.
TEST(StudyChoices, CompareTheTimeOfAToken) {
  StudyResults results = Layouts();
  results.points[1].tokens_per_step = 200;
  EXPECT_TRUE(Has(ChoicesIn(results), "and 5.0% at worst (model m1)")) << ChoicesIn(results);
  EXPECT_TRUE(Has(LinesOf(StudyCsv(results))[2], ",planner best,0"));
}

TEST(StudyFindings, SayHowFarPredictionsAreOff) {
  StudyResults results = Layouts();
  results.points[6].predicted->memory.workspace += results.points[6].predicted->memory_bytes() / 4;
  const std::vector<std::string> lines = StudyFindings(results);
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_EQ(lines[0], "predicted step time: off by 8.6% in the median and 16.7% at worst (0-1), of 8 points");
  EXPECT_EQ(lines[1], "predicted memory: off by 0.0% in the median and 25.0% at worst (1-2), of 8 points");
  EXPECT_TRUE(StudyFindings(StudyResults()).empty());
}

// What a study stores is what its own report shows.
TEST(ReadStudy, IsWhatTheStudyHas) {
  const std::string folder = ::testing::TempDir() + "report_study";
  std::filesystem::remove_all(folder);
  ASSERT_TRUE(MakeDirectories(folder).ok());
  EXPECT_TRUE(absl::IsNotFound(ReadStudy(folder).status()));
  ASSERT_TRUE(WriteFileDurably(folder + "/run.textproto", kStudyRun).ok());
  const auto study = LoadStudy(folder + "/study.textproto",
                               "name: \"s\" run: \"run.textproto\" scaling: WEAK grows: SEQUENCES_PER_STEP "
                               "axes { ranks_per_host: [1, 2, 3] cp: [1, 2] }");
  ASSERT_TRUE(study.ok()) << study.status();
  const auto points = StudyGrid(study->spec, kStudyRun);
  ASSERT_TRUE(points.ok()) << points.status();
  StudyResults own;
  StudyHooks hooks;
  hooks.can_measure = [](const PlannedPoint& planned) { return planned.point.ranks < 2; };
  hooks.measure = [](const PlannedPoint&, const std::string&) {
    return Measurement{.figures = MadeUpFigures(1, 8192, 1), .spread = 0.25, .devices = "1 x toaster"};
  };
  hooks.predict = [](const PlannedPoint& planned) -> absl::StatusOr<Prediction> {
    if (planned.point.ranks == 3) return Invalid("no rates");
    return Prediction{.figures = MadeUpFigures(planned.point.ranks, 8192, 1.5), .goodput = {}};
  };
  hooks.prediction_inputs = [](const PlannedPoint&) { return ""; };
  hooks.say = [](const std::string&) {};
  hooks.report = [&](const StudyResults& results) { return own = results, absl::OkStatus(); };
  StudyRunOptions options;
  options.folder = folder;
  options.study_text = study->text;
  ASSERT_TRUE(RunStudy(study->spec, *points, options, hooks, {}).ok());

  const absl::StatusOr<StudyResults> read = ReadStudy(folder);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->name, "s");
  EXPECT_EQ(read->scaling, Scaling::kWeak);
  EXPECT_FALSE(read->points[0].machine.device.empty());
  own.name = read->name, own.scaling = read->scaling;
  EXPECT_EQ(StudyCsv(*read), StudyCsv(own));
  EXPECT_EQ(StudyHtml(*read), StudyHtml(own));
  EXPECT_TRUE(Has(StudyHtml(own), "refused: ")) << StudyCsv(own);
  EXPECT_TRUE(Has(StudyHtml(*read), "on 1 x toaster.")) << StudyCsv(own);

  std::filesystem::remove_all(folder + "/points");
  const absl::StatusOr<StudyResults> open = ReadStudy(folder);
  ASSERT_TRUE(open.ok()) << open.status();
  EXPECT_TRUE(Has(StudyHtml(*open), ", 4 open.")) << StudyCsv(*open);
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace annulus::testing
