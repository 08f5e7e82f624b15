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
    if (options.program.mpirun.empty()) options.program = {"/tree/launch/mpirun", "/tree/build/annulus"};
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
      if (planned.point.id == does_not_fit_) return absl::ResourceExhaustedError("memory: too much");
      return Prediction{.figures = Figures(2), .goodput = Goodput{.share = 0.5}};
    };
    hooks.prediction_inputs = [this](const PlannedPoint& planned) {
      return planned.point.id == fast_ ? "GB200" : profile_;
    };
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

  std::string folder_, fails_, cannot_be_predicted_, does_not_fit_, fast_, profile_ = "H200";
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
  fast_ = "ranks_per_host=2-cp=2";  // as that of one point alone
  ASSERT_TRUE(Run(spec).ok());
  EXPECT_EQ(Count(measured_), 0);
  EXPECT_EQ(predicted_, (std::map<std::string, int>{{fast_, 1}}));
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
  EXPECT_EQ(results->points[2].state, PointState::kRefused);
  EXPECT_EQ(results->points[2].reason, "refused: 2 ranks: expected a multiple of cp 3 x tp 1");
  EXPECT_EQ(Count(predicted_), 4);
}

// Where it is measured, that says more.
TEST_F(StudyRunTest, WhatIsPredictedNotToFitIsRefusedUnlessItIsMeasured) {
  does_not_fit_ = "ranks_per_host=4-cp=2";
  auto results = Run(TinyStudy());
  ASSERT_TRUE(results.ok()) << results.status();
  EXPECT_EQ(results->points[3].state, PointState::kRefused);
  EXPECT_EQ(results->points[3].reason, "refused: memory: too much");
  results = Run(TinyStudy());
  ASSERT_TRUE(results.ok());
  EXPECT_EQ(Count(predicted_), 0);
  EXPECT_EQ(results->points[3].state, PointState::kRefused);
  ranks_here_ = 4;
  results = Run(TinyStudy());
  ASSERT_TRUE(results.ok());
  EXPECT_EQ(results->points[3].state, PointState::kDone);
  EXPECT_EQ(results->points[3].reason, "not predicted: refused: memory: too much");
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

// Scripts of points on other machines, run by bash with stand-ins for mpirun: what they do with runs that
// fail, take too long or are ended, and what `annulus study` makes of that.
class StudySlurmTest : public StudyRunTest {
 protected:
  StudySlurmTest() { spec_.repeats = 2; }

  void WriteScripts(const std::string& overrides = "") {
    if (!overrides.empty()) spec_.overrides = {overrides};
    StudyRunOptions options{.slurm = StudyRunOptions::Slurm::kWriteScripts};
    options.program = {folder_ + "/it's mpirun", "/tree/build/annulus"};
    const auto results = Run(spec_, options);
    ASSERT_TRUE(results.ok()) << results.status();
  }
  std::string Script() const { return *ReadFile(point_ + "/slurm.sbatch"); }

  // The name of run 1, as the script has it.
  std::string FirstRun() const {
    const std::string script = Script();
    const size_t at = script.find("run_dir='") + 9;
    return script.substr(at, script.find('\'', at) - at) + "1";
  }

  // `mpirun`: a script whose last argument is the run directory. Returns the exit code of the job's script.
  int Submit(const std::string& mpirun) const {
    const std::string path = folder_ + "/it's mpirun";
    EXPECT_TRUE(WriteFileAtomically(path, "#!/bin/bash\nrun=${!#}\n" + mpirun + "\n").ok());
    std::filesystem::permissions(path, std::filesystem::perms::owner_all);
    const std::string command =
        absl::StrCat("SLURM_NTASKS=4 bash '", point_, "/slurm.sbatch' >>'", folder_, "/log' 2>&1");
    const int status = std::system(command.c_str());
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

  const PointResult PointAfter(StudyRunOptions options = {}) {
    const auto results = Run(spec_, options);
    EXPECT_TRUE(results.ok()) << results.status();
    return results.ok() ? results->points[3] : PointResult();
  }

  StudySpec spec_ = TinyStudy();
  const std::string point_ = folder_ + "/study/points/ranks_per_host=4-cp=2";
};

// The process of the job's script, as mpirun finds it: timeout is between them.
constexpr char kScript[] = "$(ps -o ppid= $PPID)";

// A run of a few steps, as `annulus train` leaves it, of the step times that the stand-in is given.
std::string Trains(const std::string& step_ms) {
  return absl::StrCat("mkdir \"$run\"; for ms in ", step_ms,
                      "; do echo '{\"step_ms\":'$ms',\"exposed_exchange_ms\":1,\"memory_bytes\":"
                      "{\"parameters\":5}}'; done >\"$run/metrics.jsonl\"; "
                      "echo '{\"event\":\"done\"}' >\"$run/events.jsonl\"");
}

TEST_F(StudySlurmTest, ScriptsAskForNodesRanksGpusAndTime) {
  WriteScripts();
  EXPECT_FALSE(Exists(folder_ + "/study/points/ranks_per_host=2-cp=1/slurm.sbatch")) << "measured here";
  const std::string script = Script();
  EXPECT_TRUE(absl::StrContains(script, "\n#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=4\n")) << script;
  EXPECT_TRUE(absl::StrContains(script, "\n#SBATCH --time=01:02:00\n#SBATCH --dependency=singleton\n"))
      << script;
  EXPECT_TRUE(absl::StrContains(script, absl::StrCat("\n#SBATCH --output=\"", point_, "/slurm-%j.log\"\n")))
      << script;
  EXPECT_FALSE(absl::StrContains(script, "gpu")) << script;
  const std::string all = *ReadFile(folder_ + "/study/submit-all");
  EXPECT_TRUE(absl::StrContains(all, absl::StrCat("\nsbatch '", point_, "/slurm.sbatch'\n"))) << all;
  const size_t name = script.find("--job-name=annulus-study-");
  WriteScripts("device=CUDA");
  EXPECT_TRUE(absl::StrContains(Script(), "\n#SBATCH --gres=gpu:4\n")) << Script();
  EXPECT_NE(Script().substr(name, 40), script.substr(name, 40)) << "another run has the same job name";
}

TEST_F(StudySlurmTest, AFolderThatSlurmCannotNameIsRefused) {
  folder_ += "/100%";
  const auto results = Run(spec_, {.slurm = StudyRunOptions::Slurm::kWriteScripts});
  EXPECT_TRUE(absl::StrContains(results.status().message(), "100%/study/points/")) << results.status();
  folder_ = std::filesystem::path(folder_).parent_path();
}

TEST_F(StudySlurmTest, RunsThatAreFinishedAreCollectedAndNotMadeAgain) {
  WriteScripts();
  ASSERT_EQ(Submit("[[ $run == *1 ]] || exit 9; " + Trains("100 3 5 4")), 1);
  ASSERT_EQ(Submit(Trains("100 6 8 7")), 0) << *ReadFile(folder_ + "/log");
  ASSERT_EQ(Submit("exit 8"), 0) << "a finished run was made again";
  const PointResult point = PointAfter();
  EXPECT_EQ(Count(measured_) + Count(predicted_), 0);
  ASSERT_TRUE(point.measured.has_value()) << point.reason;
  EXPECT_DOUBLE_EQ(point.measured->step_seconds, 0.004);
  EXPECT_DOUBLE_EQ(point.measured->compute_seconds, 0.003);
  EXPECT_EQ(point.measured->memory.parameters, 5);
  EXPECT_DOUBLE_EQ(point.measured_spread, 0.75);
  std::filesystem::remove_all(FirstRun());
  EXPECT_TRUE(PointAfter().measured.has_value()) << "the result has been written down";
}

TEST_F(StudySlurmTest, UntilAllRunsAreThereThePointIsSimulatedAlone) {
  WriteScripts();
  ASSERT_EQ(
      Submit(absl::StrCat("[[ $run == *1 ]] || { kill -KILL ", kScript, "; exit; }; ", Trains("100 3 5 4"))),
      137);
  const PointResult point = PointAfter();
  EXPECT_EQ(point.state, PointState::kDone) << point.reason;
  EXPECT_FALSE(point.measured.has_value());
}

TEST_F(StudySlurmTest, AJobThatFailsIsAFailedPointWithItsReasonUntilItIsRetried) {
  WriteScripts();
  ASSERT_EQ(Submit("echo starting; echo 'error: rank 2: no data'; exit 3"), 1);
  PointResult point = PointAfter();
  EXPECT_EQ(point.state, PointState::kFailed);
  EXPECT_EQ(point.reason, absl::StrCat("exit code 3: error: rank 2: no data (", FirstRun(), ".log)"));
  WriteScripts();
  EXPECT_FALSE(absl::StrContains(*ReadFile(folder_ + "/study/submit-all"), point_));
  point =
      PointAfter({.failed = StudyRunOptions::Failed::kRetry, .slurm = StudyRunOptions::Slurm::kWriteScripts});
  EXPECT_EQ(point.state, PointState::kDone) << point.reason;
  EXPECT_TRUE(absl::StrContains(*ReadFile(folder_ + "/study/submit-all"), point_));
}

TEST_F(StudySlurmTest, ARunHasItsTimeLimit) {
  spec_.limit_minutes = 0.01;
  WriteScripts();
  ASSERT_EQ(Submit("echo at work; sleep 100"), 1);
  EXPECT_EQ(PointAfter().reason,
            absl::StrCat("took longer than measure.limit_minutes, 1s: at work (", FirstRun(), ".log)"));
}

TEST_F(StudySlurmTest, AJobThatSlurmEndsIsAFailedPoint) {
  WriteScripts();
  ASSERT_EQ(Submit(std::string("kill -TERM ") + kScript + "; exit 7"), 1);
  const PointResult point = PointAfter();
  EXPECT_EQ(point.state, PointState::kFailed);
  EXPECT_TRUE(absl::StartsWith(point.reason, "ended by Slurm: its time limit, or scancel: ")) << point.reason;
}

TEST_F(StudySlurmTest, AFinishedRunWithoutItsStepsIsAFailedPoint) {
  WriteScripts();
  ASSERT_EQ(Submit(Trains("100 3")), 0);
  EXPECT_TRUE(absl::EndsWith(PointAfter().reason, "metrics.jsonl: 2 steps, expected 4"))
      << PointAfter().reason;
}

}  // namespace
}  // namespace annulus
