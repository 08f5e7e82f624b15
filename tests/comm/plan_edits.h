#pragma once

// Steps taken out of plans and put into them, with the dependencies of the others kept.

#include "annulus/comm/exchange_plan.h"

namespace annulus::testing {

// A place in a plan.
struct At {
  size_t rank, step;
};

inline void RemoveStep(ExchangePlan* plan, const At& at) {
  std::vector<Step>& steps = plan->ranks[at.rank].steps;
  steps.erase(steps.begin() + static_cast<std::ptrdiff_t>(at.step));
  for (Step& step : steps) {
    std::erase(step.after, static_cast<int>(at.step));
    for (int& before : step.after) before -= before > static_cast<int>(at.step) ? 1 : 0;
  }
}

// Puts `step` before the step at `at`.
inline void InsertStep(ExchangePlan* plan, const At& at, const Step& step) {
  std::vector<Step>& steps = plan->ranks[at.rank].steps;
  for (Step& other : steps) {
    for (int& before : other.after) before += before >= static_cast<int>(at.step) ? 1 : 0;
  }
  steps.insert(steps.begin() + static_cast<std::ptrdiff_t>(at.step), step);
}

}  // namespace annulus::testing
