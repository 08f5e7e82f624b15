// Training that loses ranks to SIGKILL again and again ends by itself each time, loses no checkpoint, and in
// the end is bit for bit the training that was left alone.

#include "system/tiny_run.h"

namespace annulus::testing {
namespace {

constexpr int kKills = 20;
constexpr int kRanks = 4;
constexpr double kSecondsToEnd = 10;

class KillTest : public ::testing::Test {
 protected:
  KillTest() { WriteTinyInputs(folder_.path()); }

  // Goes on where there is something to go on from.
  JobSpec NextJob() const {
    const bool resume = std::filesystem::exists(run_ + "/metrics.jsonl");
    return TrainJob(folder_.path(), kRanks, "run", overrides_,
                    resume ? std::vector<std::string>{"--resume"} : std::vector<std::string>{});
  }

  // Step of the newest checkpoint, verified as a whole; 0 if there is none yet.
  int64_t SavedStep() const {
    const absl::StatusOr<Checkpoint> saved = Checkpoint::Open(run_ + "/ckpt");
    if (absl::IsNotFound(saved.status())) return 0;
    EXPECT_TRUE(saved.ok()) << saved.status();
    return saved.ok() ? saved->meta().step : -1;
  }

  // Waits for the moment to kill in: while the job starts, at a step, or in the middle of a save.
  void WaitForMoment(Job& job, uint64_t attempt) const {
    const int64_t start = SavedStep();
    std::function<bool()> moment;
    uint64_t range_us = 20'000;
    switch (random_.Below(4 * attempt, 4)) {
      case 0:  // while ranks start and find each other
        moment = [&job] { return !job.RankProcesses().empty(); };
        range_us = 100'000;
        break;
      case 1:
      case 2: {
        const int64_t step = start + 1 + static_cast<int64_t>(random_.Below(4 * attempt + 1, 5));
        moment = [this, step] { return LastStep(run_) >= step; };
        break;
      }
      case 3:
        moment = [this, start] {
          const absl::StatusOr<std::vector<std::string>> names = ListDirectory(run_ + "/ckpt");
          return LastStep(run_) > start && names.ok() && !names->empty() &&
                 absl::StartsWith(names->front(), ".tmp-");
        };
        break;
    }
    ASSERT_TRUE(job.WaitWhileRunning(moment, 60)) << "attempt " << attempt << ": " << job.Wait(0);
    std::this_thread::sleep_for(std::chrono::microseconds(random_.Below(4 * attempt + 2, range_us)));
  }

  const TemporaryFolder folder_;
  const std::string run_ = folder_.path() + "/run";
  const std::vector<std::string> overrides_ = {"parallel.dp=2", "parallel.cp=2", "optim.steps=500",
                                               "checkpoint.every_steps=2", "eval.every_steps=100"};
  const RandomStream random_{1, "kills"};
};

TEST_F(KillTest, TwentyKilledRanksChangeNothing) {
  int64_t saved = 0;
  int kills = 0;
  for (uint64_t attempt = 0; kills < kKills; ++attempt) {
    ASSERT_LT(attempt, 2u * kKills) << "too often there was no process to kill";
    Job job(NextJob());
    ASSERT_NO_FATAL_FAILURE(WaitForMoment(job, attempt));
    const std::vector<pid_t> ranks = job.RankProcesses();
    if (ranks.empty()) continue;  // the job ended in between
    ASSERT_EQ(::kill(ranks[random_.Below(4 * attempt + 3, ranks.size())], SIGKILL), 0);
    const JobResult result = job.Wait(kSecondsToEnd);
    ASSERT_TRUE(result.in_time) << "attempt " << attempt << ": " << result;
    ASSERT_NE(result.exit_code, 0) << "attempt " << attempt << ": " << result;
    const int64_t now = SavedStep();
    ASSERT_GE(now, saved) << "attempt " << attempt;
    saved = now;
    ++kills;
  }
  EXPECT_GT(saved, 0);
  ExpectDone(RunJob(NextJob()));
  ExpectDone(RunJob(TrainJob(folder_.path(), kRanks, "whole", overrides_)));
  const std::string whole = folder_.path() + "/whole";
  ExpectWholeMetrics(run_, 500, 100);
  EXPECT_EQ(MetricsDifference(run_, whole, 0), "");
  EXPECT_EQ(CheckpointDifference(run_, whole), "");
}

// A rank that stands still ends a measurement as it ends training, and the others say what they wait for.
TEST_F(KillTest, AStoppedRankEndsABench) {
  Job job({.folder = folder_.path(),
           .ranks = 2,
           .arguments = {"bench", "plans", "--length", "64", "--heads", "2", "--dim", "16", "--repeats",
                         "1000000", "--set", "step_deadline_seconds=2", "--set", "device=CPU"}});
  ASSERT_TRUE(job.WaitWhileRunning([&job] { return job.RankProcesses().size() == 2; }, 30)) << job.Wait(0);
  std::this_thread::sleep_for(
      std::chrono::seconds(5));  // more than the deadline: it measures, and progresses
  const std::vector<pid_t> ranks = job.RankProcesses();
  ASSERT_EQ(ranks.size(), 2u) << job.Wait(0);
  ASSERT_EQ(::kill(ranks[1], SIGSTOP), 0);
  const JobResult result = job.Wait(30);
  EXPECT_TRUE(result.in_time) << result;
  EXPECT_NE(result.exit_code, 0) << result;
  EXPECT_TRUE(absl::StrContains(result.err, "watchdog: rank 0: no progress for 2")) << result;
  EXPECT_TRUE(absl::StrContains(result.err, "rank 0:   measurement: ")) << result;
}

// What batch systems send first. Whether there is time to save is up to mpirun; that nothing is lost is not.
TEST_F(KillTest, SigtermToMpirunEndsTheJobAndLosesNoCheckpoint) {
  Job job(NextJob());
  ASSERT_TRUE(job.WaitWhileRunning([this] { return LastStep(run_) >= 5; }, 30)) << job.Wait(0);
  job.SignalMpirun(SIGTERM);
  const JobResult result = job.Wait(kSecondsToEnd);
  EXPECT_TRUE(result.in_time) << result;
  EXPECT_GE(SavedStep(), 4);
  ExpectDone(RunJob(NextJob()));
  ExpectWholeMetrics(run_, 500, 100);
}

}  // namespace
}  // namespace annulus::testing
