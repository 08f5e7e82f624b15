#include <algorithm>
#include <cmath>

#include "annulus/train/optimizer.h"

namespace annulus {

double LearningRate(const OptimSpec& spec, int64_t step) {
  const ScheduleSpec& schedule = spec.schedule;
  if (step < schedule.warmup_steps) {
    return spec.lr * static_cast<double>(step + 1) / static_cast<double>(schedule.warmup_steps);
  }
  const double floor = schedule.final_ratio;
  // Share of the decay that is done before this step: 1 only after the last one, so that no step is wasted
  // where the final ratio is 0. Negative before the decay starts.
  const auto progress = [&](int64_t decay_start) {
    const int64_t length = std::max<int64_t>(1, spec.steps - decay_start);
    return std::min(1.0, static_cast<double>(step - decay_start) / static_cast<double>(length));
  };
  switch (schedule.kind) {
    case ScheduleKind::kConstant:
      return spec.lr;
    case ScheduleKind::kCosine: {
      const double done = progress(schedule.warmup_steps);
      return spec.lr * (floor + (1 - floor) * 0.5 * (1 + std::cos(3.14159265358979323846 * done)));
    }
    case ScheduleKind::kWarmupStableDecay: {
      const double done = std::max(0.0, progress(spec.steps - schedule.decay_steps));
      return spec.lr * (1 - (1 - floor) * done);
    }
  }
  return spec.lr;
}

}  // namespace annulus
