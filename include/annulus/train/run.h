#pragma once

// A whole training run: run directory, steps, evaluation, checkpoints, signals, sample. Collective over the
// world.

#include <functional>
#include <string>

#include "annulus/comm/communicator.h"
#include "annulus/train/config.h"
#include "annulus/train/spec.h"

namespace annulus {

enum class StartFrom { kScratch, kLatestCheckpoint };

struct RunOptions {
  std::string run_dir;  // empty: <runs_dir>/<name>-<UTC>-<hash6>
  StartFrom start = StartFrom::kScratch;
  std::string command;  // as typed, for command.txt
  // Called with an error that this rank alone has, while all is still in place; ends the job.
  std::function<void(const absl::Status&)> fail_alone;
};

// Trains config.spec on all ranks of `world`. The spec has been validated for world.size() and is equal on
// all ranks. Errors are the same on every rank unless a rank fails alone; then the caller must end the job.
absl::Status TrainRun(Communicator world, const ResolvedConfig& config, const RunOptions& options);

// SIGUSR1 and SIGTERM from now on set a flag instead of ending the process. TrainRun saves and stops at the
// next step boundary when any rank's flag is set. A SIGTERM also prints rank and step; a second one ends the
// process at once.
void InstallStopSignals(int world_rank);
bool StopRequested();

}  // namespace annulus
