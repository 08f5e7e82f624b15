#include "annulus/study/goodput.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
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
  Failures(const GoodputInputs& inputs, int history)
      : random_(inputs.seed, absl::StrCat("failures ", history)),
        mean_seconds_(SecondsBetweenFailures(inputs)) {
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

// An attempt: steps up to the next save, and the save, which counts once it is whole. A run ends with a save.
Goodput Play(const GoodputInputs& inputs, int64_t steps_between_saves, int history) {
  Goodput result;
  const double save = SaveSeconds(inputs);
  // One that hardly ever gets from a save to the next would never end.
  const double given_up = 1000 * (static_cast<double>(inputs.steps) * inputs.step_seconds + save);
  Failures failures(inputs, history);
  double now = 0, useful = 0;
  for (int64_t saved = 0; saved < inputs.steps && now < given_up;) {
    const int64_t steps = std::min(steps_between_saves, inputs.steps - saved);
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

}  // namespace

double ExpectedShare(const GoodputInputs& inputs, int64_t steps_between_saves) {
  const double computing = static_cast<double>(steps_between_saves) * inputs.step_seconds;
  const double between = SecondsBetweenFailures(inputs), save = SaveSeconds(inputs);
  if (computing <= 0) return 1;
  if (between == kNever) return computing / (computing + save);
  return computing / (between * std::exp(inputs.reliability.restart_seconds / between) *
                      std::expm1((computing + save) / between));
}

// The share rises up to its most and falls from there: a step more is better on the one side of it alone.
int64_t BestStepsBetweenSaves(const GoodputInputs& inputs) {
  int64_t low = 1, high = std::max<int64_t>(1, inputs.steps);
  if (SecondsBetweenFailures(inputs) == kNever || inputs.step_seconds <= 0) return high;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (ExpectedShare(inputs, middle + 1) > ExpectedShare(inputs, middle)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

Goodput SimulateGoodput(const GoodputInputs& inputs) {
  Goodput mean{.share = 0, .best_steps_between_saves = BestStepsBetweenSaves(inputs)};
  mean.best_share = ExpectedShare(inputs, mean.best_steps_between_saves);
  mean.steps_between_saves =
      inputs.steps_between_saves > 0 ? inputs.steps_between_saves : mean.best_steps_between_saves;
  const int histories = SecondsBetweenFailures(inputs) == kNever ? 1 : inputs.histories;
  std::vector<double> shares;
  for (int history = 0; history < histories; ++history) {
    const Goodput one = Play(inputs, mean.steps_between_saves, history);
    shares.push_back(one.share);
    mean.share += one.share / histories;
    mean.seconds += one.seconds / histories;
    mean.failures += one.failures / histories;
    mean.saving_seconds += one.saving_seconds / histories;
    mean.lost_seconds += one.lost_seconds / histories;
    mean.restarting_seconds += one.restarting_seconds / histories;
  }
  double squares = 0;
  for (const double share : shares) squares += (share - mean.share) * (share - mean.share);
  if (histories > 1) mean.share_deviation = std::sqrt(squares / (histories - 1));
  return mean;
}

}  // namespace annulus
