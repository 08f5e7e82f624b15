// Events are ends of computing and of the phases of messages. Whatever changes how many flows share a rank's
// rates marks the rank; once all events of an instant are done, marked ranks divide their rates anew.

#include <algorithm>
#include <limits>
#include <map>
#include <queue>

#include "annulus/base/check.h"
#include "annulus/comm/exchange_simulate.h"
#include "rounds.h"

namespace annulus {
namespace {

constexpr double kUnlimited = std::numeric_limits<double>::infinity();

double RateOr(double per_second) { return per_second > 0 ? per_second : kUnlimited; }

// Work that goes on at a rate that changes.
struct Progress {
  double left = 0, per_second = 0, since = 0;
  double ends = kUnlimited;  // at this rate

  void Begin(double now, double work) { *this = {.left = work, .since = now}; }
  void SetRate(double now, double rate) {
    left = per_second == kUnlimited ? 0 : std::max(0.0, left - per_second * (now - since));
    since = now;
    per_second = rate;
    ends = now + left / rate;
  }
};

// Which of the events that speak of something's end is right.
struct Alarm {
  double time = -1;
  uint64_t version = 0;
};

// What rounding keeps apart happens at once: flows that are alike end together.
double Until(double now) { return now * (1 + 1e-9); }

class Simulator {
 public:
  Simulator(const ExchangePlan& plan, const ExchangeCost& cost) : plan_(plan), cost_(cost) {}

  Simulation Run() {
    Prepare();
    for (size_t n = 0; n < nodes_.size(); ++n) {
      if (nodes_[n].waits_for == 0) Start(n, 0);
    }
    Reshare(0);
    while (!events_.empty()) {
      const double now = events_.top().time;
      while (!events_.empty() && events_.top().time <= Until(now)) {
        const Event event = events_.top();
        events_.pop();
        Handle(event, now);
      }
      Reshare(now);
    }
    for (size_t r = 0; r < ranks_.size(); ++r) {
      ANNULUS_CHECK(ranks_[r].steps_left == 0) << plan_.name << ": rank " << r << " does not end";
      result_.makespan = std::max(result_.makespan, ranks_[r].last_end);
      result_.exposed[r] = ranks_[r].last_end - result_.compute[r];
    }
    return std::move(result_);
  }

 private:
  struct Place {
    size_t rank = 0, step = 0;
  };
  // What starts and completes together: one step, or the transfers of a round.
  struct Node {
    size_t rank = 0;
    std::vector<size_t> steps = {};
    size_t waits_for = 0;              // nodes
    size_t running = 0;                // steps
    std::vector<size_t> waiters = {};  // nodes
  };
  struct Message {
    Place from = {}, to = {};
    int ends_ready = 0;
    Progress flow = {};
  };
  struct Rank {
    size_t computing = kNone;  // step
    Progress compute = {};
    double computing_since = 0;
    bool starved = false;                   // it computes when more keys come
    Alarm computed = {}, sent = {};         // `sent`: of the first of `out` to end
    int moving = 0;                         // messages sent and received
    std::vector<size_t> out = {}, in = {};  // messages whose bytes flow
    bool marked = false, rung = false;      // rates change; `sent` does
    size_t steps_left = 0;
    double last_end = 0;
  };
  // What a step that takes keys as they come still has to get.
  struct Arriving {
    size_t receives = 0;
    double seconds = 0;  // of computing
  };
  // Messages in order of readiness. The first that is not over has the lane.
  struct Lane {
    std::vector<size_t> messages = {};
    size_t over = 0;
    bool idle() const { return over == messages.size(); }
  };

  enum class Happens { kComputed, kOverheadOver, kSent, kReceived };
  struct Event {
    double time = 0;
    uint64_t number = 0;  // events of an instant happen in order of their making
    Happens happens = Happens::kComputed;
    size_t subject = 0;    // kComputed, kSent: rank; else message
    uint64_t version = 0;  // of the rank's alarm
    friend bool operator>(const Event& a, const Event& b) {
      return a.time != b.time ? a.time > b.time : a.number > b.number;
    }
  };

  static constexpr size_t kNone = std::numeric_limits<size_t>::max();

  const Step& StepAt(const Place& place) const { return plan_.ranks[place.rank].steps[place.step]; }
  size_t LinkOf(const Message& m) const { return m.from.rank * ranks_.size() + m.to.rank; }
  const SlotSpec& SentSlot(const Message& m) const {
    return plan_.ranks[m.from.rank].slots[static_cast<size_t>(StepAt(m.from).slot)];
  }
  Lane& LaneOf(const Message& m) { return lanes_[LinkOf(m) * 2 + (IsResult(SentSlot(m).payload) ? 1 : 0)]; }

  void Prepare() {
    const size_t ranks = plan_.ranks.size();
    ranks_.resize(ranks);
    lanes_.resize(ranks * ranks * 2);
    link_flows_.resize(ranks * ranks);
    link_rates_.resize(ranks * ranks, kUnlimited);
    for (size_t link = 0; link < link_rates_.size() && cost_.link_bytes_per_second; ++link) {
      link_rates_[link] =
          RateOr(cost_.link_bytes_per_second(static_cast<int>(link / ranks), static_cast<int>(link % ranks)));
    }
    result_.compute.resize(ranks);
    result_.exposed.resize(ranks);
    result_.bytes_sent.resize(ranks);
    for (size_t r = 0; r < ranks; ++r) {
      ranks_[r].steps_left = plan_.ranks[r].steps.size();
      result_.steps.emplace_back(ranks_[r].steps_left);
      node_of_.emplace_back(ranks_[r].steps_left, kNone);
      taker_of_.emplace_back(ranks_[r].steps_left, kNone);
    }
    if (cost_.order == MessageOrder::kRounds) AddRounds();
    for (size_t r = 0; r < ranks; ++r) {
      AddNodes(r);
      AddWaits(r);
    }
    FindMessages();
  }

  size_t AddNode(size_t r, std::vector<size_t> steps) {
    for (const size_t s : steps) node_of_[r][s] = nodes_.size();
    nodes_.push_back({.rank = r, .steps = std::move(steps)});
    return nodes_.size() - 1;
  }

  void AddWait(size_t node, size_t on) {
    ++nodes_[node].waits_for;
    nodes_[on].waiters.push_back(node);
  }

  void AddRounds() {
    const std::vector<std::vector<Launch>> launches = LaunchesOf(plan_);
    for (size_t r = 0; r < launches.size(); ++r) {
      std::map<ExchangeLane, size_t> last;
      for (const Launch& launch : launches[r]) {
        if (launch.lane == ExchangeLane::kCompute) continue;
        const size_t node = AddNode(r, {launch.steps.begin(), launch.steps.end()});
        const auto [before, first] = last.try_emplace(launch.lane, node);
        if (!first) AddWait(node, std::exchange(before->second, node));
      }
    }
  }

  void AddNodes(size_t r) {
    for (size_t s = 0; s < node_of_[r].size(); ++s) {
      if (node_of_[r][s] == kNone) AddNode(r, {s});
    }
  }

  void AddWaits(size_t r) {
    size_t last_compute = kNone;
    for (size_t s = 0; s < node_of_[r].size(); ++s) {
      const Step& step = plan_.ranks[r].steps[s];
      for (const int on : step.after) {
        const auto before = static_cast<size_t>(on);
        if (cost_.arrival_seconds && ArrivesDuring(plan_.ranks[r], step, on)) {
          taker_of_[r][before] = s;
          Arriving& arriving = arriving_[{r, s}];
          ++arriving.receives;
          arriving.seconds += cost_.arrival_seconds(static_cast<int>(r), s, before);
        } else {
          AddWait(node_of_[r][s], node_of_[r][before]);
        }
      }
      if (!IsCompute(step.kind)) continue;
      if (last_compute != kNone) AddWait(node_of_[r][s], node_of_[r][last_compute]);
      last_compute = s;
    }
  }

  void FindMessages() {
    std::vector<size_t> known;  // by number
    for (size_t r = 0; r < plan_.ranks.size(); ++r) {
      message_of_.emplace_back(plan_.ranks[r].steps.size(), kNone);
      for (size_t s = 0; s < message_of_[r].size(); ++s) {
        const Step& step = plan_.ranks[r].steps[s];
        if (!IsTransfer(step.kind)) continue;
        const auto number = static_cast<size_t>(step.message);
        if (number >= known.size()) known.resize(number + 1, kNone);
        if (known[number] == kNone) {
          known[number] = messages_.size();
          messages_.emplace_back();
        }
        const size_t message = known[number];
        (step.kind == StepKind::kSend ? messages_[message].from : messages_[message].to) = {r, s};
        message_of_[r][s] = message;
      }
    }
    for (Message& m : messages_) {
      const Step& send = StepAt(m.from);
      m.flow.left = static_cast<double>(send.rows.rows.size()) * cost_.row_bytes(SentSlot(m));
    }
  }

  void Push(double time, Happens happens, size_t subject, uint64_t version = 0) {
    events_.push({time, events_made_++, happens, subject, version});
  }
  void Mark(size_t rank) {
    if (std::exchange(ranks_[rank].marked, true)) return;
    marked_.push_back(rank);
  }

  void Start(size_t n, double now) {
    const Node& node = nodes_[n];
    nodes_[n].running = node.steps.size();
    for (const size_t s : node.steps) {
      if (IsCompute(plan_.ranks[node.rank].steps[s].kind)) {
        Rank& rank = ranks_[node.rank];
        rank.computing = s;
        const double seconds = cost_.compute_seconds(static_cast<int>(node.rank), s);
        Compute(node.rank, seconds - ArrivingOf({node.rank, s}).seconds, now);
        result_.steps[node.rank][s].start = now;
        continue;
      }
      const size_t message = message_of_[node.rank][s];
      if (++messages_[message].ends_ready < 2) continue;
      Lane& lane = LaneOf(messages_[message]);
      if (lane.idle()) TakeLane(message, now);
      lane.messages.push_back(message);
    }
  }

  void Compute(size_t r, double seconds, double now) {
    Rank& rank = ranks_[r];
    rank.starved = false;
    rank.computing_since = now;
    rank.compute.Begin(now, std::max(0.0, seconds));
    Mark(r);
  }

  Arriving ArrivingOf(const Place& at) const {
    const auto found = arriving_.find({at.rank, at.step});
    return found == arriving_.end() ? Arriving() : found->second;
  }

  // A receive is complete whose keys a step takes as they come.
  void Arrive(const Place& receive, size_t taker, double now) {
    const double seconds = cost_.arrival_seconds(static_cast<int>(receive.rank), taker, receive.step);
    Arriving& arriving = arriving_[{receive.rank, taker}];
    --arriving.receives;
    arriving.seconds -= seconds;
    Rank& rank = ranks_[receive.rank];
    if (rank.computing != taker) return;  // it has not begun
    if (rank.starved) return Compute(receive.rank, seconds, now);
    rank.compute.SetRate(now, rank.compute.per_second);
    rank.compute.left += seconds;
    rank.computed = {.version = rank.computed.version + 1};
    Mark(receive.rank);
  }

  void TakeLane(size_t message, double now) {
    const Message& m = messages_[message];
    result_.steps[m.from.rank][m.from.step].start = now;
    result_.steps[m.to.rank][m.to.step].start = now;
    result_.bytes_sent[m.from.rank] += static_cast<int64_t>(m.flow.left);
    for (const size_t r : {m.from.rank, m.to.rank}) {
      ++ranks_[r].moving;
      Mark(r);
    }
    Push(now + cost_.message_overhead_seconds, Happens::kOverheadOver, message);
  }

  void Handle(const Event& event, double now) {
    switch (event.happens) {
      case Happens::kComputed: {
        Rank& rank = ranks_[event.subject];
        if (rank.computed.version != event.version) return;
        rank.computed = {.version = event.version + 1};
        result_.compute[event.subject] += now - rank.computing_since;
        rank.starved = ArrivingOf({event.subject, rank.computing}).receives > 0;
        if (rank.starved) return;
        return End({event.subject, std::exchange(rank.computing, kNone)}, now);
      }
      case Happens::kOverheadOver:
        return BeginFlow(event.subject, now);
      case Happens::kSent: {
        Alarm& alarm = ranks_[event.subject].sent;
        if (alarm.version != event.version) return;
        alarm = {.version = event.version + 1};
        return EndFlows(event.subject, now);
      }
      case Happens::kReceived:
        return End(messages_[event.subject].to, now);
    }
  }

  void BeginFlow(size_t message, double now) {
    Message& m = messages_[message];
    m.flow.since = now;
    ranks_[m.from.rank].out.push_back(message);
    ranks_[m.to.rank].in.push_back(message);
    ++link_flows_[LinkOf(m)];
    Mark(m.from.rank);
    Mark(m.to.rank);
  }

  void EndFlows(size_t sender, double now) {
    std::vector<size_t> over;
    for (const size_t message : ranks_[sender].out) {
      if (messages_[message].flow.ends <= Until(now)) over.push_back(message);
    }
    for (const size_t message : over) EndFlow(message, now);
  }

  void EndFlow(size_t message, double now) {
    Message& m = messages_[message];
    std::erase(ranks_[m.from.rank].out, message);
    std::erase(ranks_[m.to.rank].in, message);
    --link_flows_[LinkOf(m)];
    for (const size_t r : {m.from.rank, m.to.rank}) {
      --ranks_[r].moving;
      Mark(r);
    }
    Lane& lane = LaneOf(m);
    ++lane.over;
    if (!lane.idle()) TakeLane(lane.messages[lane.over], now);
    End(m.from, now);
    Push(now + cost_.message_seconds, Happens::kReceived, message);
  }

  void End(const Place& place, double now) {
    result_.steps[place.rank][place.step].end = now;
    ranks_[place.rank].last_end = now;
    --ranks_[place.rank].steps_left;
    const size_t taker = taker_of_[place.rank][place.step];
    if (taker != kNone) Arrive(place, taker, now);
    Node& node = nodes_[node_of_[place.rank][place.step]];
    if (--node.running > 0) return;
    for (const size_t waiter : node.waiters) {
      if (--nodes_[waiter].waits_for == 0) Start(waiter, now);
    }
  }

  // Gives the computing and the flows of marked ranks their rates.
  void Reshare(double now) {
    for (const size_t r : marked_) {
      Rank& rank = ranks_[r];
      rank.marked = false;
      if (rank.computing != kNone && !rank.starved) {
        rank.compute.SetRate(now, rank.moving > 0 ? 1 / cost_.computing_slowdown : 1);
        Set(rank.compute.ends, Happens::kComputed, r, &rank.computed);
      }
      for (const size_t message : rank.out) ShareOut(now, message);
      for (const size_t message : rank.in) ShareOut(now, message);
      Ring(r);
    }
    marked_.clear();
    for (const size_t r : rung_) {
      Rank& rank = ranks_[r];
      rank.rung = false;
      double first = kUnlimited;
      for (const size_t message : rank.out) first = std::min(first, messages_[message].flow.ends);
      Set(first, Happens::kSent, r, &rank.sent);
    }
    rung_.clear();
  }

  void ShareOut(double now, size_t message) {
    Message& m = messages_[message];
    const Rank &from = ranks_[m.from.rank], &to = ranks_[m.to.rank];
    double rate = std::min(RateOr(cost_.egress_bytes_per_second) / static_cast<double>(from.out.size()),
                           RateOr(cost_.ingress_bytes_per_second) / static_cast<double>(to.in.size()));
    const size_t link = LinkOf(m);
    rate = std::min(rate, link_rates_[link] / link_flows_[link]);
    if (rate == m.flow.per_second) return;
    m.flow.SetRate(now, rate);
    Ring(m.from.rank);
  }

  void Ring(size_t sender) {
    if (!std::exchange(ranks_[sender].rung, true)) rung_.push_back(sender);
  }

  // The alarm goes off at `time`; if that is kUnlimited, not at all.
  void Set(double time, Happens happens, size_t rank, Alarm* alarm) {
    if (alarm->time == time) return;
    *alarm = {.time = time, .version = alarm->version + 1};
    if (time < kUnlimited) Push(time, happens, rank, alarm->version);
  }

  const ExchangePlan& plan_;
  const ExchangeCost& cost_;
  Simulation result_;
  std::vector<Rank> ranks_;
  std::vector<Node> nodes_;
  std::vector<std::vector<size_t>> node_of_, message_of_;  // [rank][step]
  std::vector<std::vector<size_t>> taker_of_;  // [rank][receive]: the step that takes its keys as they come
  std::map<std::pair<size_t, size_t>, Arriving> arriving_;  // by rank and step
  std::vector<Message> messages_;
  std::vector<Lane> lanes_;            // [from][to][operands, results]
  std::vector<int> link_flows_;        // [from][to]
  std::vector<double> link_rates_;     // [from][to]
  std::vector<size_t> marked_, rung_;  // ranks
  std::priority_queue<Event, std::vector<Event>, std::greater<Event>> events_;
  uint64_t events_made_ = 0;
};

}  // namespace

Simulation Simulate(const ExchangePlan& plan, const ExchangeCost& cost) {
  return Simulator(plan, cost).Run();
}

}  // namespace annulus
