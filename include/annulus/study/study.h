#pragma once

// A scaling study: points of a grid over a base run, each measured where the machine has the ranks for it,
// else simulated. The schema is src/config/study.proto.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "annulus/study/goodput.h"
#include "annulus/study/simulate_step.h"
#include "annulus/train/study_config.h"

namespace annulus {

// One run of the grid. `labels`: its value on each axis, in the order of the axes.
struct StudyPoint {
  std::string id;  // "ranks_per_host=8-seq_len=32768", a file name: no other point of the study has it
  struct Label {
    std::string axis, value;
  };
  std::vector<Label> labels;
  std::vector<std::string> overrides;  // "data.seq_len=32768", as --set takes them
  int64_t ranks = 1, hosts = 1;
};

enum class PointState {
  kOpen,
  kDone,
  kFailed,
  kRefused,  // there is nothing to run: it makes no sense, or is predicted not to fit in memory
};
const char* Name(PointState state);  // "open", "done", ...
// What the reason of a refused point begins with.
inline constexpr char kRefusedText[] = "refused: ";

// What a point is predicted for, of its machine profile.
struct PointMachine {
  std::string device;        // empty: there is no profile
  bool measured = false;     // the profile is; else assumed
  int64_t memory_bytes = 0;  // of a rank; 0: not known
};

struct PointResult {
  StudyPoint point;
  PointMachine machine = {};
  PointState state = PointState::kOpen;
  std::string reason;  // kFailed, kRefused: why; kDone: why it was measured, but not predicted, if so
  int64_t tokens_per_step = 0;
  std::string layout;                   // "dp 2 x cp 4 x tp 1"
  std::optional<StepFigures> measured;  // medians over steps and repeats
  double measured_spread = 0;           // (slowest - fastest repeat) / median
  std::string measured_on = {};         // "4 x NVIDIA H200"; empty: the runs do not say
  std::optional<StepFigures> predicted;
  std::optional<Goodput> goodput;  // of the prediction
};

struct StudyResults {
  std::string name;
  Scaling scaling = Scaling::kStrong;
  std::vector<PointResult> points;  // in the order of the grid
};

}  // namespace annulus
