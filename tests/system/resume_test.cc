// Runs that stop and go on: on the same layout bit for bit as if they had never stopped, on another within
// rounding.

#include "system/tiny_run.h"

namespace annulus::testing {
namespace {

using Strings = std::vector<std::string>;

class ResumeTest : public ::testing::Test {
 protected:
  void SetUp() override { WriteTinyInputs(folder_.path()); }

  std::string Path(const std::string& run) const { return folder_.path() + "/" + run; }
  void Train(int ranks, const std::string& run, const Strings& overrides, const Strings& options = {}) const {
    ExpectDone(RunJob(TrainJob(folder_.path(), ranks, run, overrides, options)));
  }
  // The run as it was after its first checkpoint, as if all later work had been lost, metrics excepted.
  void CopyWithout(const std::string& from, const std::string& to, const std::string& step) const {
    std::filesystem::copy(Path(from), Path(to), std::filesystem::copy_options::recursive);
    ASSERT_GT(std::filesystem::remove_all(Path(to) + "/ckpt/" + step), 0u);
    ASSERT_TRUE(std::filesystem::remove(Path(to) + "/ckpt/LATEST"));
  }

  const TemporaryFolder folder_;
};

TEST_F(ResumeTest, OnTheSameLayoutIsBitForBitTheUndisturbedRun) {
  const Strings overrides = {"parallel.dp=2", "parallel.cp=2", "checkpoint.every_steps=5"};
  Train(4, "whole", overrides);
  EXPECT_EQ(Names(Path("whole") + "/ckpt"), (Strings{"LATEST", "step-00000005", "step-00000008"}));
  ExpectWholeMetrics(Path("whole"), 8, 4);

  CopyWithout("whole", "resumed", "step-00000008");
  Train(4, "resumed", overrides, {"--resume"});
  ExpectWholeMetrics(Path("resumed"), 8, 4);
  EXPECT_EQ(MetricsDifference(Path("resumed"), Path("whole"), 0), "");
  EXPECT_EQ(CheckpointDifference(Path("resumed"), Path("whole")), "");
  EXPECT_EQ(Contents(Path("resumed") + "/ckpt/LATEST"), "step-00000008\n");

  // The comparison sees a difference: another seed is another run.
  Train(4, "other", {"parallel.dp=2", "parallel.cp=2", "seed=8"});
  EXPECT_NE(MetricsDifference(Path("other"), Path("whole"), 1e-4), "");
  EXPECT_NE(CheckpointDifference(Path("other"), Path("whole")), "");
}

// In double, so that nothing but rounding can hide below the tolerance: 1e-16 a sum, grown over a few hundred
// operations and ten updates.
TEST_F(ResumeTest, OnEveryOtherLayoutIsEqualWithinRounding) {
  const Strings common = {"compute=F64", "checkpoint.keep=1"};
  const auto with = [&](Strings more) {
    more.insert(more.end(), common.begin(), common.end());
    return more;
  };
  Train(1, "whole", with({"optim.schedule.constant.warmup_steps=2", "optim.steps=10", "eval.every_steps=2"}));
  struct Part {
    int dp, cp;
    const char* layout;
  };
  const Part parts[] = {
      {2, 2, "ZIGZAG"}, {1, 3, "STRIPED"}, {2, 1, "CONTIGUOUS"}, {1, 1, "ZIGZAG"}, {1, 2, "ZIGZAG"}};
  int64_t steps = 0;
  for (const Part& part : parts) {
    const Strings options = steps == 0 ? Strings{} : Strings{"--resume"};
    steps += 2;
    Train(part.dp * part.cp, "parts",
          with({absl::StrCat("parallel.dp=", part.dp), absl::StrCat("parallel.cp=", part.cp),
                absl::StrCat("parallel.layout=", part.layout), absl::StrCat("optim.steps=", steps),
                "optim.schedule.constant.warmup_steps=2", "eval.every_steps=2"}),
          options);
    ExpectWholeMetrics(Path("parts"), steps, 2);
  }
  EXPECT_EQ(MetricsDifference(Path("parts"), Path("whole"), 1e-11), "");
}

// float32 sums round at 6e-8, and ten updates of AdamW, which divides gradients by their own size, grow that.
TEST_F(ResumeTest, LossesDoNotDependOnTheNumberOfRanks) {
  Train(1, "one", {});
  const std::pair<int, int> meshes[] = {{1, 2}, {1, 3}, {2, 1}, {2, 2}, {2, 3}};
  for (const auto& [dp, cp] : meshes) {
    const std::string run = absl::StrCat("dp", dp, "cp", cp);
    Train(dp * cp, run, {absl::StrCat("parallel.dp=", dp), absl::StrCat("parallel.cp=", cp)});
    EXPECT_EQ(MetricsDifference(Path(run), Path("one"), 2e-5), "") << run;
  }
}

TEST_F(ResumeTest, KeepsTheNewestCheckpointsAndAFinishedRunStaysAsItIs) {
  const Strings overrides = {"checkpoint.every_steps=2", "checkpoint.keep=3", "optim.steps=9"};
  Train(2, "run", overrides);
  EXPECT_EQ(Names(Path("run") + "/ckpt"),
            (Strings{"LATEST", "step-00000006", "step-00000008", "step-00000009"}));
  EXPECT_EQ(Contents(Path("run") + "/ckpt/LATEST"), "step-00000009\n");
  const std::map<std::string, std::string> before = Snapshot(Path("run"));
  Train(2, "run", overrides, {"--resume"});
  std::map<std::string, std::string> after = Snapshot(Path("run"));
  for (const char* changes : {"command.txt", "env.json"}) after[changes] = before.at(changes);
  EXPECT_EQ(after, before);
}

// What a crash leaves at the end of metrics.jsonl: steps after the checkpoint, and half a line.
TEST_F(ResumeTest, MetricsAreWholeAfterATornLine) {
  Train(2, "run", {"optim.steps=3", "optim.schedule.constant.warmup_steps=3"});
  const std::string path = Path("run") + "/metrics.jsonl";
  Overwrite(path, Contents(path) + "{\"step\":4,\"loss\":1.0}\n{\"step\":5,\"lo");
  Train(2, "run", {"optim.steps=6", "optim.schedule.constant.warmup_steps=3"}, {"--resume"});
  const std::vector<nlohmann::json> lines = ReadMetrics(Path("run"));
  ASSERT_EQ(lines.size(), 6u);
  for (size_t i = 0; i < lines.size(); ++i) {
    EXPECT_EQ(lines[i]["step"], i + 1);
    EXPECT_TRUE(lines[i].contains("grad_norm")) << lines[i];
  }
}

class SignalTest : public ResumeTest, public ::testing::WithParamInterface<int> {};

TEST_P(SignalTest, Sigusr1ToMpirunSavesAndStopsAtAStepBoundary) {
  const int cp = GetParam();
  const Strings overrides = {"parallel.dp=2", absl::StrCat("parallel.cp=", cp), "optim.steps=400",
                             "eval.every_steps=50"};
  const int ranks = 2 * cp;
  Job job(TrainJob(folder_.path(), ranks, "run", overrides));
  ASSERT_TRUE(job.WaitWhileRunning([&] { return LastStep(Path("run")) >= 3; }, 30)) << job.Wait(0);
  job.SignalMpirun(SIGUSR1);
  const JobResult stopped = job.Wait(10);
  ExpectDone(stopped);

  const int64_t step = LastStep(Path("run"));
  EXPECT_GE(step, 3);
  ASSERT_LT(step, 400);
  EXPECT_TRUE(absl::StrContains(stopped.out, absl::StrCat("stopped by a signal after step ", step)))
      << stopped;
  const absl::StatusOr<Checkpoint> saved = Checkpoint::Open(Path("run") + "/ckpt");
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(saved->meta().step, step);
  EXPECT_EQ(saved->meta().consumed_sequences, step * 4);

  Train(ranks, "run", overrides, {"--resume"});
  Train(ranks, "whole", overrides);
  ExpectWholeMetrics(Path("run"), 400, 50);
  EXPECT_EQ(MetricsDifference(Path("run"), Path("whole"), 0), "");
  EXPECT_EQ(CheckpointDifference(Path("run"), Path("whole")), "");
}

INSTANTIATE_TEST_SUITE_P(Meshes, SignalTest, ::testing::Values(1, 2));

}  // namespace
}  // namespace annulus::testing
