#include "annulus/study/goodput.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "annulus/base/random.h"

namespace annulus {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

double SaveSeconds(const GoodputInputs& inputs) {
  const double per_second = inputs.reliability.storage_bytes_per_second * static_cast<double>(inputs.hosts);
  return per_second > 0 ? static_cast<double>(inputs.checkpoint_bytes) / per_second : 0;
}

// Of all hosts together.
double SecondsBetweenFailures(const GoodputInputs& inputs) {
  const double hours = inputs.reliability.failure_hours;
  return hours > 0 ? hours * 3600 / static_cast<double>(inputs.hosts) : kNever;
}

// When the job fails next. Failures come whatever the job does.
class Failures {
 public:
  explicit Failures(const GoodputInputs& inputs)
      : random_(inputs.seed, "failures"), mean_seconds_(SecondsBetweenFailures(inputs)) {
    Draw();
  }
  double next() const { return next_; }
  void Draw() {
    next_ += mean_seconds_ == kNever ? kNever : -mean_seconds_ * std::log1p(-random_.Uniform(drawn_++));
  }

 private:
  RandomStream random_;
  double mean_seconds_;
  double next_ = 0;
  uint64_t drawn_ = 0;
};

}  // namespace

int64_t BestStepsBetweenSaves(const GoodputInputs& inputs) {
  const int64_t most = std::max<int64_t>(1, inputs.steps);
  const double between = SecondsBetweenFailures(inputs);
  if (between == kNever || inputs.step_seconds <= 0) return most;
  const double steps = std::round(std::sqrt(2 * SaveSeconds(inputs) * between) / inputs.step_seconds);
  return std::clamp<int64_t>(steps < static_cast<double>(most) ? static_cast<int64_t>(steps) : most, 1, most);
}

// An attempt: steps up to the next save, and the save, which counts once it is whole. A run ends with a save.
Goodput SimulateGoodput(const GoodputInputs& inputs) {
  Goodput result{.steps_between_saves = inputs.steps_between_saves > 0 ? inputs.steps_between_saves
                                                                       : BestStepsBetweenSaves(inputs)};
  const double save = SaveSeconds(inputs);
  // One that hardly ever gets from a save to the next would never end.
  const double given_up = 1000 * (static_cast<double>(inputs.steps) * inputs.step_seconds + save);
  Failures failures(inputs);
  double now = 0, useful = 0;
  for (int64_t saved = 0; saved < inputs.steps && now < given_up;) {
    const int64_t steps = std::min(result.steps_between_saves, inputs.steps - saved);
    const double computing = static_cast<double>(steps) * inputs.step_seconds;
    if (failures.next() >= now + computing + save) {
      now += computing + save;
      useful += computing;
      result.saving_seconds += save;
      saved += steps;
      continue;
    }
    result.lost_seconds += failures.next() - now;
    now = failures.next();
    // One that fails while it starts begins to start again.
    double up = now;
    while (failures.next() <= up && up < given_up) {
      up = failures.next() + inputs.reliability.restart_seconds;
      failures.Draw();
      ++result.failures;
    }
    result.restarting_seconds += up - now;
    now = up;
  }
  result.seconds = now;
  if (now > 0) result.share = useful / now;
  return result;
}

}  // namespace annulus
