#include <algorithm>
#include <cstring>
#include <map>
#include <random>

#include "annulus/comm/exchange_replay.h"

namespace annulus {
namespace {

struct StepOfRank {
  size_t rank, step;
};

class Replayer {
 public:
  Replayer(const ExchangePlan& plan, const std::vector<ExchangeBinding>& ranks, uint64_t seed)
      : plan_(plan),
        bindings_(ranks),
        random_(seed),
        done_(plan.ranks.size()),
        next_compute_(plan.ranks.size()) {
    ANNULUS_CHECK(ranks.size() == plan.ranks.size()) << plan.name << ": " << ranks.size() << " bindings";
    for (size_t r = 0; r < plan.ranks.size(); ++r) {
      done_[r].resize(StepsOf(r).size());
      steps_left_ += StepsOf(r).size();
      for (size_t s = 0; s < StepsOf(r).size(); ++s) {
        const Step& step = StepsOf(r)[s];
        if (step.kind == StepKind::kReceive) receives_[step.message] = {r, s};
      }
    }
  }

  absl::Status Run() {
    while (steps_left_ > 0) {
      const std::vector<StepOfRank> allowed = Allowed();
      if (allowed.empty()) {
        return absl::FailedPreconditionError(
            absl::StrCat(plan_.name, ": ", steps_left_, " steps wait for each other"));
      }
      ANNULUS_RETURN_IF_ERROR(Do(allowed[random_() % allowed.size()]));
    }
    return absl::OkStatus();
  }

 private:
  const std::vector<Step>& StepsOf(size_t r) const { return plan_.ranks[r].steps; }

  bool Ready(const StepOfRank& at) const {
    const std::vector<int>& after = StepsOf(at.rank)[at.step].after;
    return !done_[at.rank][at.step] && std::all_of(after.begin(), after.end(), [&](int before) {
      return static_cast<bool>(done_[at.rank][static_cast<size_t>(before)]);
    });
  }

  // The next computing step of each rank, and sends both ends of which are ready.
  std::vector<StepOfRank> Allowed() {
    std::vector<StepOfRank> allowed;
    for (size_t r = 0; r < plan_.ranks.size(); ++r) {
      size_t& next = next_compute_[r];
      while (next < StepsOf(r).size() && (!IsCompute(StepsOf(r)[next].kind) || done_[r][next])) ++next;
      if (next < StepsOf(r).size() && Ready({r, next})) allowed.push_back({r, next});
      for (size_t s = 0; s < StepsOf(r).size(); ++s) {
        if (StepsOf(r)[s].kind != StepKind::kSend || !Ready({r, s})) continue;
        const auto receive = receives_.find(StepsOf(r)[s].message);
        if (receive != receives_.end() && Ready(receive->second)) allowed.push_back({r, s});
      }
    }
    return allowed;
  }

  absl::Status Do(const StepOfRank& at) {
    const Step& step = StepsOf(at.rank)[at.step];
    Complete(at);
    if (IsCompute(step.kind)) return bindings_[at.rank].compute(step);
    const StepOfRank to = receives_.at(step.message);
    Complete(to);
    Move(at, to);
    return absl::OkStatus();
  }
  void Complete(const StepOfRank& at) {
    done_[at.rank][at.step] = true;
    --steps_left_;
  }

  TensorRef RowsOf(const StepOfRank& at, size_t field) const {
    const Step& step = StepsOf(at.rank)[at.step];
    const size_t slot = static_cast<size_t>(step.slot);
    const int64_t row = RowInSlot(plan_, plan_.ranks[at.rank].slots[slot], step.rows);
    return bindings_[at.rank].slots[slot].fields[field].Rows(row, row + step.rows.rows.size());
  }
  void Move(const StepOfRank& from, const StepOfRank& to) const {
    const size_t slot = static_cast<size_t>(StepsOf(from.rank)[from.step].slot);
    for (size_t field = 0; field < bindings_[from.rank].slots[slot].fields.size(); ++field) {
      const TensorRef source = RowsOf(from, field), target = RowsOf(to, field);
      ANNULUS_CHECK(source.bytes() == target.bytes() && source.dtype() == target.dtype())
          << plan_.name << ": message " << StepsOf(from.rank)[from.step].message;
      std::memcpy(target.raw(), source.raw(), static_cast<size_t>(source.bytes()));
    }
  }

  const ExchangePlan& plan_;
  const std::vector<ExchangeBinding>& bindings_;
  std::mt19937_64 random_;
  std::vector<std::vector<bool>> done_;  // [rank][step]
  std::vector<size_t> next_compute_;     // by rank
  std::map<int, StepOfRank> receives_;   // by message
  size_t steps_left_ = 0;
};

}  // namespace

absl::Status Replay(const ExchangePlan& plan, const std::vector<ExchangeBinding>& ranks, uint64_t seed) {
  return Replayer(plan, ranks, seed).Run();
}

}  // namespace annulus
