#pragma once

// How much of the time of a long run is progress, where hosts fail, checkpoints take time and what was done
// since the last one is lost.

#include <cstdint>

#include "annulus/parallel/machine_profile.h"

namespace annulus {

struct GoodputInputs {
  double step_seconds = 0;
  int64_t hosts = 1;
  int64_t checkpoint_bytes = 0;     // of the whole job, written by all hosts together
  int64_t steps_between_saves = 0;  // 0: what BestStepsBetweenSaves says
  int64_t steps = 0;                // of the run
  ReliabilityProfile reliability;
  uint64_t seed = 0;
};

struct Goodput {
  double share = 1;    // of the time that steps which count took
  double seconds = 0;  // of the whole run
  int64_t failures = 0;
  int64_t steps_between_saves = 0;
  double saving_seconds = 0, lost_seconds = 0, restarting_seconds = 0;
};

// Failures at exponential times, by events. A job that does not get ahead is given up when it has taken 1000
// times as long as it would without failures.
Goodput SimulateGoodput(const GoodputInputs& inputs);

// Young's sqrt(2 C M), C the seconds of a save and M the mean seconds between failures of the job, in steps.
int64_t BestStepsBetweenSaves(const GoodputInputs& inputs);

}  // namespace annulus
