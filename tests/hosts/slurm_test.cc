// launch/slurm.sbatch as Slurm runs it, over two hosts: near the time limit it saves, stops and queues itself
// again, and the next start goes on. Slurm itself is left out: scontrol is a script that notes its arguments,
// and Open MPI finds the hosts by their file.

#include <cstdlib>
#include <filesystem>

#include "system/tiny_run.h"

namespace annulus::testing {
namespace {

class SlurmTest : public ::testing::Test {
 protected:
  SlurmTest() {
    WriteTinyInputs(folder_.path());
    std::filesystem::create_directories(At("bin"));
    std::filesystem::create_symlink(ThisTree().program, At("bin/annulus"));
    std::filesystem::create_directory_symlink(ThisTree().files + "/launch", At("launch"));
    Overwrite(At("bin/scontrol"), absl::StrCat("#!/bin/sh\necho \"$@\" >>", At("scontrol.txt"), "\n"));
    std::filesystem::permissions(At("bin/scontrol"), std::filesystem::perms::owner_all);
  }
  std::string At(const std::string& name) const { return folder_.path() + "/" + name; }
  std::string Run() const { return At("run"); }

  JobSpec Submitted(int steps) const {
    const std::string hosts = std::filesystem::path(ThisTree().program).replace_filename("namespace_hosts");
    return {.folder = folder_.path(),
            .under = {"/usr/bin/env", absl::StrCat("PATH=", At("bin"), ":", std::getenv("PATH")),
                      "SLURM_JOB_ID=77", "SLURM_NTASKS=4", "SLURM_SUBMIT_DIR=" + folder_.path(),
                      "OMPI_MCA_ras=^slurm", "OMPI_MCA_plm=rsh", hosts, "--hosts", "2", "--slots", "2", "--"},
            .command = {"bash", ThisTree().files + "/launch/slurm.sbatch", "c.textproto", "run", "--set",
                        "parallel.dp=2", "--set", "parallel.cp=2", "--set", "eval.every_steps=0", "--set",
                        absl::StrCat("optim.steps=", steps)}};
  }

  const TemporaryFolder folder_;
};

TEST_F(SlurmTest, NearTheLimitItSavesAndQueuesItselfAgainAndThenGoesOn) {
  constexpr int kSteps = 200;
  int64_t stopped = 0;
  {
    Job job(Submitted(kSteps));
    ASSERT_TRUE(job.WaitWhileRunning([this] { return LastStep(Run()) >= 5; }, 30)) << job.Wait(0);
    job.SignalMpirun(SIGUSR1);
    ExpectDone(job.Wait(30));
    stopped = LastStep(Run());
    ASSERT_LT(stopped, kSteps);
    EXPECT_EQ(Checkpoint::Open(Run() + "/ckpt").value().meta().step, stopped);
    EXPECT_EQ(Contents(At("scontrol.txt")), "requeue 77\n");
  }
  const JobResult resumed = RunJob(Submitted(kSteps));
  ExpectDone(resumed);
  EXPECT_TRUE(absl::StrContains(resumed.out, absl::StrCat("at step ", stopped))) << resumed;
  EXPECT_EQ(LastStep(Run()), kSteps);
  EXPECT_EQ(Contents(At("scontrol.txt")), "requeue 77\n");  // not when it is done
}

TEST_F(SlurmTest, AFailedJobIsNotQueuedAgain) {
  JobSpec spec = Submitted(10);
  spec.command.insert(spec.command.end(), {"--set", "parallel.cp=3"});
  const JobResult result = RunJob(spec);
  EXPECT_NE(result.exit_code, 0) << result;
  EXPECT_EQ(Contents(At("scontrol.txt")), "");
}

}  // namespace
}  // namespace annulus::testing
