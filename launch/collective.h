#pragma once

// What commands that run on all ranks of mpirun share.

#include <functional>

#include "annulus/comm/communicator.h"
#include "annulus/train/spec.h"
#include "commands.h"

namespace annulus {

// Starts MPI and calls `run` on every rank. An error that all ranks agreed on is rank 0's to report; one that
// this rank has alone ends the job.
absl::Status OnAllRanks(const std::function<absl::Status(Communicator world)>& run);

// The spec of --config, --set and options that stand for fields, with its device found; without --config, of
// a run that needs no model, all ranks in one context-parallel group. `checked`: an error of this rank alone
// that came before. Collective.
absl::StatusOr<RunSpec> SpecOf(const Arguments& arguments, Communicator world, const absl::Status& checked);

}  // namespace annulus
