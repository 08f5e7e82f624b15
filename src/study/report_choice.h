#pragma once

// The planner's choice against the best measured: of points that differ in their layout alone, the one that
// is predicted to be fastest, and the one that was.

#include <string>
#include <vector>

#include "annulus/study/study.h"

namespace annulus {

// Points that are alike on all axes but those of the layout: dp, cp, tp, plan, transport, fields of
// `parallel`, `recompute` and `optim.micro_batch`.
struct LayoutCase {
  std::string label;          // "ranks_per_host 4, model dense"
  const PointResult* choice;  // measured, or failed
  const PointResult* best;    // of those measured
  int64_t measured = 0;       // points
  double slower_by = 0;       // measured seconds of a token, less one; infinite where the choice failed
};

// In the order of the grid: cases with two measured points at least, in which the planner's choice was run.
// `results` outlives them.
std::vector<LayoutCase> LayoutCases(const StudyResults& results);

// "cp 2, recompute NONE"
std::string LayoutText(const PointResult& point);

// "planner's choice against the best measured layout: ..."; empty without cases.
std::string ChoiceText(const std::vector<LayoutCase>& cases);

}  // namespace annulus
