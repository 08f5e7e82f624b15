// Studies with a runner that only counts: what is run, what is kept, and what is run again.

#include <filesystem>
#include <map>
#include <numeric>

#include "absl/strings/match.h"
#include "annulus/base/file.h"
#include "study/study_test_config.h"

namespace annulus {
namespace {

class StudyRunTest : public ::testing::Test {
 protected:
  StudyRunTest() {
    folder_ = ::testing::TempDir() + "annulus_study_XXXXXX";
    EXPECT_NE(mkdtemp(folder_.data()), nullptr);
  }
  ~StudyRunTest() override { std::filesystem::remove_all(folder_); }

  absl::StatusOr<StudyResults> Run(const StudySpec& spec, StudyRunOptions options = {}) {
    options.folder = folder_ + "/study";
    options.program = {"/tree/launch/mpirun", "/tree/build/annulus"};
    measured_.clear();
    predicted_.clear();
    StudyHooks hooks;
    hooks.can_measure = [this](const PlannedPoint& planned) { return planned.point.ranks <= ranks_here_; };
    hooks.measure = [this](const PlannedPoint& planned,
                           const std::string& folder) -> absl::StatusOr<Measurement> {
      EXPECT_TRUE(Exists(folder + "/config.textproto"));
      ++measured_[planned.point.id];
      if (planned.point.id == fails_) return Invalid("no luck");
      return Measurement{.figures = Figures(static_cast<double>(planned.point.ranks)), .spread = 0.25};
    };
    hooks.predict = [this](const PlannedPoint& planned) -> absl::StatusOr<Prediction> {
      ++predicted_[planned.point.id];
      if (planned.point.id == cannot_be_predicted_) return Invalid("no rates");
      return Prediction{.figures = Figures(2), .goodput = Goodput{.share = 0.5}};
    };
    hooks.prediction_inputs = profile_;
    hooks.say = [this](const std::string& line) { said_.push_back(line); };
    hooks.report = [this](const StudyResults& results) {
      ++reports_;
      if (reports_ == stop_after_reports_) return absl::CancelledError("killed");
      EXPECT_EQ(results.name, "study");
      return absl::OkStatus();
    };
    const auto points = StudyGrid(spec, kStudyRun);
    if (!points.ok()) return points.status();
    StudyResults empty;
    empty.name = spec.name;
    return RunStudy(spec, *points, options, hooks, empty);
  }

  static StepFigures Figures(double seconds) {
    StepFigures figures;
    figures.step_seconds = seconds;
    figures.plans = {"forward: kv_ring by host"};
    return figures;
  }

  static int Count(const std::map<std::string, int>& runs) {
    return std::accumulate(runs.begin(), runs.end(), 0,
                           [](int sum, const auto& run) { return sum + run.second; });
  }

  std::string folder_, fails_, cannot_be_predicted_, profile_ = "H200";
  int64_t ranks_here_ = 2;
  int reports_ = 0, stop_after_reports_ = -1;
  std::map<std::string, int> measured_, predicted_;
  std::vector<std::string> said_;
};

TEST_F(StudyRunTest, MeasuresWhatFitsAndPredictsEverything) {
  const auto results = Run(TinyStudy());
  ASSERT_TRUE(results.ok()) << results.status();
  ASSERT_EQ(results->points.size(), 4u);
  EXPECT_EQ(Count(measured_), 2);
  EXPECT_EQ(Count(predicted_), 4);
  for (const PointResult& result : results->points) {
    EXPECT_EQ(result.state, PointState::kDone) << result.reason;
    EXPECT_EQ(result.measured.has_value(), result.point.ranks == 2);
    EXPECT_TRUE(result.predicted.has_value());
    EXPECT_TRUE(result.goodput.has_value());
    EXPECT_EQ(result.tokens_per_step, 96);
  }
  ASSERT_EQ(said_.size(), 4u);
  EXPECT_TRUE(absl::StartsWith(said_[1],
                               "point 2/4 ranks_per_host=2-cp=2 | dp 1 x cp 2 x tp 1 | measured 2 s | "
                               "predicted 2 s | ETA "))
      << said_[1];
  EXPECT_FALSE(absl::StrContains(said_[3], "ETA")) << said_[3];
}

TEST_F(StudyRunTest, FinishedPointsAreNotRunAgain) {
  stop_after_reports_ = 3;
  EXPECT_FALSE(Run(TinyStudy()).ok());
  EXPECT_EQ(Count(predicted_), 3);
  stop_after_reports_ = -1;
  const auto results = Run(TinyStudy());
  ASSERT_TRUE(results.ok()) << results.status();
  EXPECT_EQ(Count(measured_), 0);
  EXPECT_EQ(predicted_, (std::map<std::string, int>{{"ranks_per_host=4-cp=2", 1}}));
  EXPECT_DOUBLE_EQ(results->points[1].measured->step_seconds, 2);
  EXPECT_EQ(results->points[1].measured->plans.size(), 1u);
  EXPECT_DOUBLE_EQ(results->points[1].measured_spread, 0.25);
  EXPECT_DOUBLE_EQ(results->points[0].goodput->share, 0.5);
}

TEST_F(StudyRunTest, AResultThatIsCutOffIsMadeAnew) {
  ASSERT_TRUE(Run(TinyStudy()).ok());
  const std::string path = folder_ + "/study/points/ranks_per_host=2-cp=1/result.json";
  const std::string text = *ReadFile(path);
  ASSERT_TRUE(WriteFileAtomically(path, text.substr(0, text.size() / 2)).ok());
  ASSERT_TRUE(Run(TinyStudy()).ok());
  EXPECT_EQ(measured_, (std::map<std::string, int>{{"ranks_per_host=2-cp=1", 1}}));
}

TEST_F(StudyRunTest, WhatChangedIsRunAgain) {
  StudySpec spec = TinyStudy();
  ASSERT_TRUE(Run(spec).ok());
  spec.axes[0].values.push_back({"4", {"parallel.cp=4"}});  // a new value leaves the others as they are
  ASSERT_TRUE(Run(spec).ok());
  EXPECT_EQ(predicted_, (std::map<std::string, int>{{"ranks_per_host=4-cp=4", 1}}));
  profile_ = "H100";  // only predictions depend on it
  ASSERT_TRUE(Run(spec).ok());
  EXPECT_EQ(Count(measured_), 0);
  EXPECT_EQ(Count(predicted_), 5);
  spec.jitter = 0.5;
  ASSERT_TRUE(Run(spec).ok());
  EXPECT_EQ(Count(measured_), 0);
  EXPECT_EQ(Count(predicted_), 5);
  spec.repeats = 2;
  ASSERT_TRUE(Run(spec).ok());
  EXPECT_EQ(Count(measured_), 2);
  EXPECT_EQ(Count(predicted_), 0);
  spec.overrides = {"model.d_model=32"};
  ASSERT_TRUE(Run(spec).ok());
  EXPECT_EQ(Count(measured_), 2);
  EXPECT_EQ(Count(predicted_), 5);
}

TEST_F(StudyRunTest, AMachineWithMoreRanksMeasuresWhatWasOnlyPredicted) {
  ASSERT_TRUE(Run(TinyStudy()).ok());
  ranks_here_ = 4;
  ASSERT_TRUE(Run(TinyStudy()).ok());
  EXPECT_EQ(Count(measured_), 2);
  EXPECT_EQ(Count(predicted_), 0);
  ranks_here_ = 1;  // what was measured stays
  const auto results = Run(TinyStudy());
  ASSERT_TRUE(results.ok());
  EXPECT_EQ(Count(measured_) + Count(predicted_), 0);
  for (const PointResult& result : results->points) EXPECT_TRUE(result.measured.has_value());
}

TEST_F(StudyRunTest, AFailedPointIsRecordedAndTheStudyGoesOn) {
  fails_ = "ranks_per_host=2-cp=1";
  cannot_be_predicted_ = "ranks_per_host=4-cp=1";
  auto results = Run(TinyStudy());
  ASSERT_TRUE(results.ok()) << results.status();
  EXPECT_EQ(results->points[0].state, PointState::kFailed);
  EXPECT_EQ(results->points[0].reason, "no luck");
  EXPECT_TRUE(results->points[0].predicted.has_value());
  EXPECT_EQ(results->points[1].state, PointState::kDone);
  EXPECT_EQ(results->points[2].state, PointState::kFailed);
  EXPECT_EQ(results->points[2].reason, "no rates");
  fails_ = cannot_be_predicted_ = "";
  results = Run(TinyStudy());
  ASSERT_TRUE(results.ok());
  EXPECT_EQ(Count(measured_) + Count(predicted_), 0);
  EXPECT_EQ(results->points[0].state, PointState::kFailed);
  results = Run(TinyStudy(), {.failed = StudyRunOptions::Failed::kRetry});
  ASSERT_TRUE(results.ok());
  EXPECT_EQ(measured_, (std::map<std::string, int>{{"ranks_per_host=2-cp=1", 1}}));
  EXPECT_EQ(predicted_, (std::map<std::string, int>{{"ranks_per_host=4-cp=1", 1}}));
  for (const PointResult& result : results->points) EXPECT_EQ(result.state, PointState::kDone);
}

TEST_F(StudyRunTest, AMeasuredPointNeedsNoPrediction) {
  cannot_be_predicted_ = "ranks_per_host=2-cp=1";
  const auto results = Run(TinyStudy());
  ASSERT_TRUE(results.ok());
  EXPECT_EQ(results->points[0].state, PointState::kDone);
  EXPECT_EQ(results->points[0].reason, "not predicted: no rates");
}

TEST_F(StudyRunTest, RefusedPointsAreRecordedWithoutARun) {
  StudySpec spec = TinyStudy();
  spec.axes[0].values.push_back({"3", {"parallel.cp=3"}});
  const auto results = Run(spec);
  ASSERT_TRUE(results.ok());
  EXPECT_EQ(results->points[2].state, PointState::kFailed);
  EXPECT_EQ(results->points[2].reason, "refused: 2 ranks: expected a multiple of cp 3 x tp 1");
  EXPECT_EQ(Count(predicted_), 4);
}

TEST_F(StudyRunTest, OnePointAlone) {
  auto results = Run(TinyStudy(), {.only = "ranks_per_host=2-cp=2"});
  ASSERT_TRUE(results.ok()) << results.status();
  EXPECT_EQ(measured_, (std::map<std::string, int>{{"ranks_per_host=2-cp=2", 1}}));
  EXPECT_EQ(Count(predicted_), 1);
  EXPECT_EQ(results->points[0].state, PointState::kOpen);
  EXPECT_EQ(results->points[1].state, PointState::kDone);
  EXPECT_EQ(Run(TinyStudy(), {.only = "x"}).status().message(),
            "--point=x: expected the id of a point, such as ranks_per_host=2-cp=1");
}

TEST_F(StudyRunTest, TwoStudiesInOneFolderAreRefused) {
  ASSERT_TRUE(MakeDirectories(folder_ + "/study").ok());
  const auto lock = FileLock::Take(folder_ + "/study/lock", "a study, pid 7");
  ASSERT_TRUE(lock.ok());
  const absl::Status status = Run(TinyStudy()).status();
  EXPECT_TRUE(absl::StartsWith(status.message(), "--out: expected no other study in it: ")) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "pid 7")) << status;
  EXPECT_EQ(Count(measured_), 0);
}

// A run directory as `annulus train` leaves it.
void WriteRun(const std::string& path, const std::vector<double>& step_ms) {
  ASSERT_TRUE(MakeDirectories(path).ok());
  std::string metrics;
  for (const double ms : step_ms) {
    absl::StrAppend(&metrics, "{\"step_ms\":", ms,
                    ",\"exposed_exchange_ms\":1,\"memory_bytes\":{\"parameters\":5}}\n");
  }
  ASSERT_TRUE(WriteFileAtomically(path + "/metrics.jsonl", metrics).ok());
  ASSERT_TRUE(WriteFileAtomically(path + "/events.jsonl", "{\"event\":\"done\"}\n").ok());
}

TEST_F(StudyRunTest, SlurmScriptsForTheRestAndTheirRunsAreCollected) {
  StudySpec spec = TinyStudy();
  spec.repeats = 2;
  const StudyRunOptions slurm{.slurm = StudyRunOptions::Slurm::kWriteScripts};
  ASSERT_TRUE(Run(spec, slurm).ok());
  const std::string points = folder_ + "/study/points/";
  EXPECT_FALSE(Exists(points + "ranks_per_host=2-cp=1/slurm.sbatch"));
  const std::string folder = points + "ranks_per_host=4-cp=2", script = *ReadFile(folder + "/slurm.sbatch");
  EXPECT_TRUE(absl::StrContains(script, "#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=4\n")) << script;
  EXPECT_TRUE(absl::StrContains(script, "#SBATCH --time=01:02:00\n")) << script;
  EXPECT_EQ(std::system(absl::StrCat("bash -n '", folder, "/slurm.sbatch'").c_str()), 0);
  const std::string all = *ReadFile(folder_ + "/study/submit-all");
  EXPECT_TRUE(absl::StrContains(all, absl::StrCat("\nsbatch '", folder, "/slurm.sbatch'\n"))) << all;

  // The script itself, with stand-ins for mpirun: it names the run directories.
  const size_t at = script.find("run_dir='") + 9;
  const std::string run_dir = script.substr(at, script.find('\'', at) - at);
  ASSERT_TRUE(absl::StartsWith(run_dir, folder + "/slurm-")) << script;
  WriteRun(run_dir + "1", {100, 3, 5, 4});
  ASSERT_TRUE(Run(spec).ok());
  EXPECT_FALSE(Run(spec)->points[3].measured.has_value()) << "one of two runs";
  WriteRun(run_dir + "2", {100, 6, 8, 7});
  const auto results = Run(spec);
  ASSERT_TRUE(results.ok());
  EXPECT_EQ(Count(measured_) + Count(predicted_), 0);
  ASSERT_TRUE(results->points[3].measured.has_value());
  EXPECT_DOUBLE_EQ(results->points[3].measured->step_seconds, 0.004);
  EXPECT_DOUBLE_EQ(results->points[3].measured->compute_seconds, 0.003);
  EXPECT_EQ(results->points[3].measured->memory.parameters, 5);
  EXPECT_DOUBLE_EQ(results->points[3].measured_spread, 0.75);
  std::filesystem::remove_all(run_dir + "1");
  EXPECT_TRUE(Run(spec)->points[3].measured.has_value()) << "the result has been written down";
}

}  // namespace
}  // namespace annulus
