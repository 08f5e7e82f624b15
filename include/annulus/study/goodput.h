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
  int histories = 100;  // of failures, that are played
};

// Means over histories of failures.
struct Goodput {
  double share = 1;            // of the time that steps which count took
  double share_deviation = 0;  // standard deviation of one history's
  double seconds = 0;          // of the whole run
  double failures = 0;
  int64_t steps_between_saves = 0;
  double saving_seconds = 0, lost_seconds = 0, restarting_seconds = 0;
  int64_t best_steps_between_saves = 0;  // BestStepsBetweenSaves, and the share expected with them
  double best_share = 1;
};

// Failures at exponential times, by events, each history from its own seed. A job that does not get ahead is
// given up when it has taken 1000 times as long as it would without failures.
Goodput SimulateGoodput(const GoodputInputs& inputs);

// The share that is expected of saves so many steps apart. J. T. Daly, "A higher order estimate of the
// optimum checkpoint interval for restart dumps", 2006, eq. 9: from one save to the next a job of mean time M
// between failures takes M e^(R / M) (e^((T + C) / M) - 1) where T of it computes, C saves and R restarts.
double ExpectedShare(const GoodputInputs& inputs, int64_t steps_between_saves);

// Where that is most: about Young's sqrt(2 C M) in steps.
int64_t BestStepsBetweenSaves(const GoodputInputs& inputs);

}  // namespace annulus
