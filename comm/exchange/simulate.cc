// Discrete events: the end of each step. A step that has become ready is given its time at once: on the
// compute lane of its rank in program order, or on the egress of the sender and the ingress of the receiver,
// first come first served.

#include <algorithm>
#include <map>
#include <optional>
#include <queue>
#include <tuple>

#include "plan_text.h"

namespace annulus {
namespace {

class Simulator {
 public:
  Simulator(const ExchangePlan& plan, const ExchangeCost& cost) : plan_(plan), cost_(cost) {}

  Simulation Run() {
    Prepare();
    for (size_t r = 0; r < plan_.ranks.size(); ++r) {
      for (size_t s = 0; s < StepsOf(r).size(); ++s) {
        if (state_[r].waits_for[s] == 0) Ready(r, s, 0);
      }
    }
    while (!events_.empty()) {
      const auto [time, r, s] = events_.top();
      events_.pop();
      Complete(r, s, time);
    }
    for (size_t r = 0; r < plan_.ranks.size(); ++r) {
      ANNULUS_CHECK(state_[r].completed == StepsOf(r).size()) << "rank " << r << ": the plan does not end";
      const double end = state_[r].last_end;
      result_.makespan = std::max(result_.makespan, end);
      result_.exposed[r] = end - result_.compute[r];
    }
    return std::move(result_);
  }

 private:
  struct Place {
    size_t rank, step;
  };
  struct RankState {
    std::vector<size_t> waits_for;             // by step: how many steps it still waits for
    std::vector<std::vector<size_t>> waiters;  // by step
    double egress_free = 0, ingress_free = 0, last_end = 0;
    size_t completed = 0;
  };

  const std::vector<Step>& StepsOf(size_t r) const { return plan_.ranks[r].steps; }

  void Prepare() {
    const size_t ranks = plan_.ranks.size();
    state_.resize(ranks);
    result_.compute.resize(ranks);
    result_.exposed.resize(ranks);
    result_.bytes_sent.resize(ranks);
    result_.steps.resize(ranks);
    for (size_t r = 0; r < ranks; ++r) {
      const size_t count = StepsOf(r).size();
      result_.steps[r].resize(count);
      state_[r].waits_for.resize(count);
      state_[r].waiters.resize(count);
      std::optional<size_t> last_compute;
      const auto wait = [&](size_t s, size_t on) {
        ++state_[r].waits_for[s];
        state_[r].waiters[on].push_back(s);
      };
      for (size_t s = 0; s < count; ++s) {
        for (const int dependency : StepsOf(r)[s].after) wait(s, static_cast<size_t>(dependency));
        if (!IsCompute(StepsOf(r)[s].kind)) continue;
        if (last_compute.has_value()) wait(s, *last_compute);
        last_compute = s;
      }
    }
  }

  double RowBytes(size_t r, int slot) const {
    const bool is_kv = plan_.ranks[r].slots[static_cast<size_t>(slot)].payload == Payload::kKv;
    return is_kv ? cost_.kv_row_bytes : cost_.grad_row_bytes;
  }
  static double Seconds(double bytes, double bytes_per_second) {
    return bytes_per_second > 0 ? bytes / bytes_per_second : 0;
  }

  double ComputeSeconds(const Step& step) const {
    if (step.kind == StepKind::kReduce) {
      return Seconds(static_cast<double>(step.rows.size()) * cost_.grad_row_bytes,
                     cost_.reduce_bytes_per_second);
    }
    int64_t pairs = 0;
    for (const BlockPair& pair : step.pairs) pairs += pair.pairs;
    return static_cast<double>(pairs) * cost_.seconds_per_pair;
  }

  void Ready(size_t r, size_t s, double now) {
    const Step& step = StepsOf(r)[s];
    if (IsCompute(step.kind)) {
      const double seconds = ComputeSeconds(step);
      result_.compute[r] += seconds;
      Schedule(r, s, now, now + seconds);
      return;
    }
    const auto [half, first] = half_ready_.try_emplace(step.message, Place{r, s});
    if (first) return;
    const Place other = half->second;
    const bool send = step.kind == StepKind::kSend;
    Transfer(send ? Place{r, s} : other, send ? other : Place{r, s}, now);
  }

  void Transfer(const Place& from, const Place& to, double now) {
    RankState &sender = state_[from.rank], &receiver = state_[to.rank];
    const Step& send = StepsOf(from.rank)[from.step];
    const double bytes = static_cast<double>(send.rows.size()) * RowBytes(from.rank, send.slot);
    const double start = std::max({now, sender.egress_free, receiver.ingress_free});
    const double end = start + Seconds(bytes, cost_.bytes_per_second);
    sender.egress_free = receiver.ingress_free = end;
    result_.bytes_sent[from.rank] += static_cast<int64_t>(bytes);
    Schedule(from.rank, from.step, start, end);
    Schedule(to.rank, to.step, start, end + cost_.message_seconds);
  }

  void Schedule(size_t r, size_t s, double start, double end) {
    result_.steps[r][s] = {start, end};
    events_.push({end, r, s});
  }

  void Complete(size_t r, size_t s, double now) {
    RankState& state = state_[r];
    ++state.completed;
    state.last_end = std::max(state.last_end, now);
    for (const size_t waiter : state.waiters[s]) {
      if (--state.waits_for[waiter] == 0) Ready(r, waiter, now);
    }
  }

  const ExchangePlan& plan_;
  const ExchangeCost& cost_;
  Simulation result_;
  std::vector<RankState> state_;
  std::map<int, Place> half_ready_;                  // messages one end of which is ready
  using Event = std::tuple<double, size_t, size_t>;  // end, rank, step
  std::priority_queue<Event, std::vector<Event>, std::greater<Event>> events_;
};

}  // namespace

Simulation Simulate(const ExchangePlan& plan, const ExchangeCost& cost) {
  return Simulator(plan, cost).Run();
}

}  // namespace annulus
