#pragma once

// The layout of a run on a number of ranks that steps fastest, by prediction, among those that fit in memory:
// dp x cp x tp, the micro-batch and what is recomputed. The global batch stays as it is, and exchange plans
// are those that the trainer would choose.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "annulus/study/simulate_step.h"

namespace annulus {

// A layout is settled once its step was simulated, or it is known to be too slow or too large.
struct FitProgress {
  size_t layouts = 0, settled = 0;
  int64_t predicted = 0;  // of those settled
};

enum class FitSearch {
  kBounded,  // layouts that take longer than those shown by what they take at least are not simulated
  kEvery,    // every layout that fits is: the same answer, later
};

struct FitOptions {
  int64_t ranks = 1;
  int64_t memory_bytes = 0;  // of a rank; 0: the machine's. Where neither is known everything fits
  size_t shown = 10;         // candidates that are given
  FitSearch search = FitSearch::kBounded;
  std::function<void(const FitProgress&)> progress = {};  // called now and then, by one thread
};

struct FitLayout {
  int64_t dp = 1, cp = 1, tp = 1;
  int64_t micro_batch = 1;
  Recompute recompute = Recompute::kNone;
  friend bool operator==(const FitLayout&, const FitLayout&) = default;
};
const char* Name(Recompute policy);                  // "ATTENTION_OUTPUT"
std::string MeshText(const FitLayout& layout);       // "dp 8 x cp 4 x tp 2"
std::string OverridesText(const FitLayout& layout);  // "--set parallel.dp=8 --set ..."
RunSpec WithLayout(RunSpec spec, const FitLayout& layout);

struct FitCandidate {
  FitLayout layout;
  StepFigures figures;
};

// Layouts that were not taken for the same reason.
struct FitLosers {
  std::string reason;
  std::vector<std::string> layouts;
};

struct FitResult {
  std::vector<FitCandidate> best;  // fastest first
  std::vector<FitLosers> losers;
  int64_t memory_bytes = 0;  // of a rank; 0: not known
  int64_t predicted = 0;     // layouts whose step was simulated
};

// spec.device and spec.compute are resolved; its layout is not looked at. Recomputing costs time and saves
// memory, so that of each mesh and micro-batch only the least of it that fits is predicted.
//
// Best first: the layout with the least bound goes on, first to have its plans chosen, which makes its bound
// tighter, then to be simulated; until all that are left take longer at least than the last that is shown.
// The same on any number of cores. InvalidArgument where no layout can be or none fits, with what comes
// closest.
absl::StatusOr<FitResult> Fit(const RunSpec& spec, const MachineProfile& machine, const FitOptions& options);

}  // namespace annulus
