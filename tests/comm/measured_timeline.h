#pragma once

// What holds of the measured timeline of every execution: each step of the plan once, in an order that the
// plan allows.

#include <gtest/gtest.h>

#include <map>

#include "../../comm/exchange/plan_text.h"
#include "annulus/comm/exchange_timeline.h"

namespace annulus::testing {

// Seconds by which times that should be in order, or the same, may be the other way round or apart.
struct TimelineSlack {
  double own = 1e-9;     // of one rank
  double others = 1e-9;  // of different ranks
};
inline void CheckMeasured(const ExchangePlan& plan, const Simulation& measured,
                          const TimelineSlack& slack = {}) {
  EXPECT_EQ(measured.source, TimeSource::kMeasured);
  ASSERT_EQ(measured.steps.size(), plan.ranks.size());
  std::map<int, double> began;  // by message
  double last = 0;
  for (size_t r = 0; r < plan.ranks.size(); ++r) {
    const std::vector<Step>& steps = plan.ranks[r].steps;
    const std::vector<StepTiming>& timings = measured.steps[r];
    ASSERT_EQ(timings.size(), steps.size());
    double computed = 0, computed_until = 0;
    for (size_t s = 0; s < steps.size(); ++s) {
      SCOPED_TRACE(StepText(plan, static_cast<int>(r), s));
      const StepTiming& timing = timings[s];
      EXPECT_GE(timing.start, -slack.own);
      EXPECT_GE(timing.end, timing.start);
      EXPECT_LE(timing.end, measured.makespan + slack.own);
      for (const int before : steps[s].after)
        EXPECT_GE(timing.start, timings[static_cast<size_t>(before)].end - slack.own)
            << "after step " << before;
      last = std::max(last, timing.end);
      if (IsTransfer(steps[s].kind)) {
        const auto [other, first] = began.try_emplace(steps[s].message, timing.start);
        EXPECT_NEAR(timing.start, other->second, slack.others);
        continue;
      }
      EXPECT_GE(timing.start, computed_until - slack.own);  // one after the other
      computed_until = timing.end;
      computed += timing.end - timing.start;
    }
    EXPECT_NEAR(measured.compute[r], computed, 1e-9);
    EXPECT_GE(measured.exposed[r], -slack.own);
    EXPECT_LE(measured.exposed[r] + measured.compute[r], measured.makespan + slack.own);
  }
  EXPECT_LE(last, measured.makespan + slack.own);
}

}  // namespace annulus::testing
