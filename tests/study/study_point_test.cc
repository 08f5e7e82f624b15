// What measuring a point rests on: child jobs, hostfiles, which points fit, figures of run directories; and
// that the studies that ship make sense.

#include <csignal>
#include <filesystem>

#include "../../src/study/study_job.h"
#include "../../src/study/study_measure.h"
#include "absl/strings/match.h"
#include "annulus/base/file.h"
#include "study/study_test_config.h"

namespace annulus {
namespace {

class StudyJobTest : public ::testing::Test {
 protected:
  StudyJobTest() {
    folder_ = ::testing::TempDir() + "annulus_job_XXXXXX";
    EXPECT_NE(mkdtemp(folder_.data()), nullptr);
  }
  ~StudyJobTest() override { std::filesystem::remove_all(folder_); }

  absl::Status Shell(const std::string& script, double limit_seconds = 60) const {
    return RunChildJob(
        {.words = {"/bin/sh", "-c", script}, .log = folder_ + "/log", .limit_seconds = limit_seconds});
  }

  std::string folder_;
};

TEST_F(StudyJobTest, TheReasonIsWhatTheProgramSaysElseTheLastLines) {
  EXPECT_TRUE(Shell("echo fine").ok());
  EXPECT_EQ(*ReadFile(folder_ + "/log"), "fine\n");
  EXPECT_EQ(Shell("echo a; echo 'error: rank 1: no data' >&2; echo b; exit 3").message(),
            absl::StrCat("exit code 3: error: rank 1: no data (", folder_, "/log)"));
  EXPECT_EQ(Shell("for i in 1 2 3 4 5 6; do echo line $i; done; exit 1").message(),
            absl::StrCat("exit code 1: line 3 | line 4 | line 5 | line 6 (", folder_, "/log)"));
  EXPECT_TRUE(absl::StartsWith(Shell("kill -KILL $$").message(), "ended by signal 9"));
}

TEST_F(StudyJobTest, ALimitEndsTheJobWithAllItsProcesses) {
  const absl::Status status = Shell("echo started; sleep 1000 & echo $! >" + folder_ + "/pid; wait", 0.5);
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(absl::StrContains(status.message(), "measure.limit_minutes")) << status;
  const pid_t left = std::stoi(*ReadFile(folder_ + "/pid"));
  EXPECT_EQ(kill(left, 0), -1) << "its child is still there";
}

TEST(StudyPoint, HostfilesAreReadAsMpirunReadsThem) {
  const auto hosts = ParseHostfile("hosts", "# nodes\nnode1 slots=8 max_slots=9\n\nnode2\n");
  ASSERT_TRUE(hosts.ok()) << hosts.status();
  ASSERT_EQ(hosts->size(), 2u);
  EXPECT_EQ((*hosts)[0].name, "node1");
  EXPECT_EQ((*hosts)[0].ranks, 8);
  EXPECT_EQ((*hosts)[1].ranks, 1);
  EXPECT_EQ(ParseHostfile("hosts", "a\nb slots=x").status().message(),
            "hosts:2: slots=x: expected slots=N, at least 1");
  EXPECT_EQ(ParseHostfile("hosts", "#").status().message(),
            "hosts: expected at least one line such as \"node1 slots=8\"");
}

TEST(StudyPoint, IsMeasuredWhereItsRanksAre) {
  StudySpec spec = TinyStudy();
  spec.hosts = {1, 2};
  const std::vector<PlannedPoint> points = Grid(spec);  // hosts 1: 2 2 4 4 ranks; hosts 2: 4 4 8 8
  MeasuringMachine machine{.program = {}, .gpus = 8, .cpu_ranks = 2};
  EXPECT_TRUE(CanMeasure(machine, points[0]));
  EXPECT_FALSE(CanMeasure(machine, points[2])) << "the run is on CPUs";
  EXPECT_FALSE(CanMeasure(machine, points[4])) << "two hosts";
  machine.hosts = {{"a", 4}, {"b", 2}};
  EXPECT_TRUE(CanMeasure(machine, points[2]));
  EXPECT_TRUE(CanMeasure(machine, points[4]));
  EXPECT_FALSE(CanMeasure(machine, points[6])) << "host b has two";
  spec.overrides = {"device=CUDA"};
  EXPECT_TRUE(CanMeasure({.program = {}, .gpus = 4, .cpu_ranks = 1}, Grid(spec)[2]));
  EXPECT_FALSE(CanMeasure({.program = {}, .gpus = 0, .cpu_ranks = 8}, Grid(spec)[2]));
}

TEST(StudyPoint, AHostHoldsAsManyRanksAsItsProfileSays) {
  StudySpec spec = TinyStudy();
  spec.overrides = {"parallel.exchange.profile=" ANNULUS_SOURCE_DIR
                    "/configs/machine/cpu_hosts_10g.textproto"};
  const std::vector<PlannedPoint> points = Grid(spec);
  ASSERT_EQ(points.size(), 4u);
  EXPECT_TRUE(ProfileOf(points[0]).ok()) << ProfileOf(points[0]).status();
  const absl::Status status = ProfileOf(points[2]).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(
      absl::StartsWith(status.message(), "ranks_per_host=4: expected at most 2, the ranks of a host of "))
      << status;
}

// Each point's own profile, not that of the study's first.
TEST(StudyPoint, PredictionsDependOnThePointsProfile) {
  StudySpec spec = TinyStudy();
  spec.ranks_per_host = {2};
  spec.axes = {{"profile", {}}};
  const std::string folder = ANNULUS_SOURCE_DIR "/configs/machine/";
  for (const char* name : {"cpu_hosts_10g", "h200_x8_400g"}) {
    const std::string field = absl::StrCat("parallel.exchange.profile=", folder, name, ".textproto");
    spec.axes[0].values.push_back({name, {field}});
  }
  const std::vector<PlannedPoint> points = Grid(spec);
  ASSERT_EQ(points.size(), 2u);
  EXPECT_EQ(PredictionInputs(points[0]), PredictionInputs(points[0]));
  EXPECT_NE(PredictionInputs(points[0]), PredictionInputs(points[1]));
  // And the program, by a hash of 16 digits.
  EXPECT_EQ(PredictionInputs(points[0]).find(' '), 16u) << PredictionInputs(points[0]);
  spec.axes[0].values.resize(1);
  spec.axes[0].values[0].overrides = {"parallel.exchange.profile=nowhere.textproto"};
  EXPECT_TRUE(absl::StrContains(PredictionInputs(Grid(spec)[0]), "nowhere.textproto"));
}

TEST(StudyPoint, WhatDoesNotFitInMemoryIsNoFailureOfThePrediction) {
  StudySpec spec = TinyStudy();
  spec.ranks_per_host = {1};
  spec.axes = {{"model", {{"wide", {"model.d_model=65536", "model.mlp={ d_ff: 262144 }"}}}}};
  spec.overrides = {"parallel.exchange.profile=" ANNULUS_SOURCE_DIR "/configs/machine/h200_x8_400g.textproto",
                    "device=CUDA"};
  const auto prediction = PredictPoint(spec, Grid(spec)[0]);
  EXPECT_TRUE(absl::IsResourceExhausted(prediction.status())) << prediction.status();
  EXPECT_TRUE(absl::StartsWith(prediction.status().message(), "memory: a rank is predicted to need "))
      << prediction.status();
}

TEST_F(StudyJobTest, FiguresAreMediansOfTheStepsThatCount) {
  std::string lines;
  for (const int ms : {100, 10, 30, 20}) {
    absl::StrAppend(
        &lines, "{\"step_ms\":", ms, ",\"exposed_exchange_ms\":2,\"exposed_reduce_ms\":3,\"data_ms\":1,",
        "\"tokens_per_second\":", 1000 / ms, ",\"attention\":[{\"pass\":\"forward\",\"plan\":\"kv_ring\",",
        "\"transport\":\"host\"}],\"sent_bytes\":{\"inside_hosts\":11,\"between_hosts\":13},",
        "\"memory_bytes\":{\"parameters\":5,\"other\":7}}\n");
  }
  ASSERT_TRUE(WriteFileAtomically(folder_ + "/metrics.jsonl", lines).ok());
  ASSERT_TRUE(WriteFileAtomically(folder_ + "/env.json",
                                  "{\"ranks\":3,\"devices\":{\"NVIDIA H100\":1,\"NVIDIA H200\":2}}")
                  .ok());
  const auto measured = MeasurementOfRun(folder_, 1, 3);
  ASSERT_TRUE(measured.ok()) << measured.status();
  EXPECT_EQ(measured->devices, "1 x NVIDIA H100, 2 x NVIDIA H200");
  const StepFigures* figures = &measured->figures;
  EXPECT_DOUBLE_EQ(figures->step_seconds, 0.020);
  EXPECT_DOUBLE_EQ(figures->exposed_exchange_seconds, 0.002);
  EXPECT_DOUBLE_EQ(figures->exposed_gradients_seconds, 0.003);
  EXPECT_DOUBLE_EQ(figures->compute_seconds, 0.014);
  EXPECT_DOUBLE_EQ(figures->tokens_per_second, 50);
  EXPECT_EQ(figures->memory.parameters, 5);
  EXPECT_EQ(figures->other_memory_bytes, 7);
  EXPECT_EQ(figures->bytes_inside_hosts, 11);
  EXPECT_EQ(figures->bytes_between_hosts, 13);
  EXPECT_EQ(figures->plans, std::vector<std::string>{"forward: kv_ring by host"});
  EXPECT_TRUE(absl::EndsWith(MeasurementOfRun(folder_, 1, 4).status().message(), "4 steps, expected 5"));
  ASSERT_TRUE(WriteFileAtomically(folder_ + "/metrics.jsonl", lines + "{\"step_m").ok());
  EXPECT_FALSE(MeasurementOfRun(folder_, 1, 4).ok());
}

TEST(StudyPoint, SpreadIsOverRepeats) {
  std::vector<Measurement> runs(4);
  for (size_t i = 0; i < 4; ++i) {
    runs[i].figures.step_seconds = std::vector<double>{4, 1, 3, 2}[i];
    runs[i].devices = std::vector<std::string>{"", "a", "b", "a"}[i];
  }
  const Measurement measurement = MedianRun(runs);
  EXPECT_DOUBLE_EQ(measurement.figures.step_seconds, 2);
  EXPECT_DOUBLE_EQ(measurement.spread, 1.5);
  EXPECT_EQ(measurement.devices, "a or b");
}

// A point without a profile does not hide those that have one.
TEST(StudyPoint, EachHasItsMachine) {
  StudySpec spec = TinyStudy();
  spec.ranks_per_host = {2};
  spec.axes = {{"profile", {}}};
  const std::string folder = ANNULUS_SOURCE_DIR "/configs/machine/";
  for (const auto& [name, device] :
       {std::pair{"nowhere", "CPU"}, {"cpu_hosts_10g", "CPU"}, {"h200_x8_400g", "CUDA"}}) {
    const std::string field = absl::StrCat("parallel.exchange.profile=", folder, name, ".textproto");
    spec.axes[0].values.push_back({name, {field, absl::StrCat("device=", device)}});
  }
  const auto results = OpenResults(spec, Grid(spec));
  ASSERT_TRUE(results.ok()) << results.status();
  EXPECT_EQ(results->points[0].machine.device, "");
  EXPECT_TRUE(absl::StartsWith(results->points[1].machine.device, "CPU"))
      << results->points[1].machine.device;
  EXPECT_TRUE(absl::StrContains(results->points[2].machine.device, "H200"));
  EXPECT_GT(results->points[2].machine.memory_bytes, int64_t{100} << 30);
  spec.axes[0].values.resize(1);
  EXPECT_TRUE(absl::StrContains(OpenResults(spec, Grid(spec)).status().message(), "nowhere.textproto"));
}

TEST(ShippedStudies, HavePointsThatMakeSense) {
  int studies = 0;
  for (const auto& entry : std::filesystem::directory_iterator(ANNULUS_SOURCE_DIR "/configs/study")) {
    const std::string path = entry.path().string();
    const auto study = LoadStudy(path, *ReadFile(path));
    ASSERT_TRUE(study.ok()) << study.status();
    EXPECT_EQ(study->spec.name, entry.path().stem().string());
    const auto run = ReadFile(study->spec.run);
    ASSERT_TRUE(run.ok()) << run.status();
    const auto points = StudyGrid(study->spec, *run);
    ASSERT_TRUE(points.ok()) << points.status();
    EXPECT_TRUE(ProfileOf(*std::find_if(points->begin(), points->end(),
                                        [](const PlannedPoint& planned) { return planned.refused.ok(); }))
                    .ok())
        << path;
    ++studies;
  }
  EXPECT_GE(studies, 2);
}

}  // namespace
}  // namespace annulus
