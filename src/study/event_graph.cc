// Events are ends of computing, of latencies and of flows. Whatever changes how many flows share a link marks
// the link; once all events of an instant are over, the flows of marked links get their rates anew. What
// slows computing down, or no longer does, gives the task that runs another end at once.

#include "annulus/study/event_graph.h"

#include <algorithm>
#include <limits>
#include <queue>
#include <utility>

#include "annulus/base/check.h"

namespace annulus {
namespace {

constexpr double kUnlimited = std::numeric_limits<double>::infinity();

double RateOr(double per_second) { return per_second > 0 ? per_second : kUnlimited; }

// What rounding keeps apart happens at once: flows that are alike end together.
double Until(double now) { return now * (1 + 1e-12); }

}  // namespace

int EventGraph::AddLink(double bytes_per_second) {
  links_.push_back(RateOr(bytes_per_second));
  return static_cast<int>(links_.size()) - 1;
}

TaskId EventGraph::Add(Kind kind, double amount, absl::Span<const TaskId> after) {
  const auto id = static_cast<TaskId>(tasks_.size());
  ANNULUS_CHECK(amount >= 0) << "task " << id << ": " << amount;
  tasks_.push_back({.amount = amount, .first_after = static_cast<uint32_t>(after_.size()), .kind = kind});
  for (const TaskId before : after) {
    ANNULUS_CHECK(before >= kNoTask && before < id) << "task " << id << " after " << before;
    if (before != kNoTask) after_.push_back(before);
  }
  return id;
}

TaskId EventGraph::Compute(int rank, double seconds, absl::Span<const TaskId> after) {
  const auto r = static_cast<size_t>(rank);
  if (r >= last_of_rank_.size()) last_of_rank_.resize(r + 1, kNoTask);
  const TaskId id = Add(Kind::kCompute, seconds, after);
  tasks_.back().of = rank;
  const TaskId before = std::exchange(last_of_rank_[r], id);
  if (before != kNoTask) after_.push_back(before);
  return id;
}

TaskId EventGraph::Transfer(const Flow& flow, absl::Span<const TaskId> after) {
  const TaskId id = Add(Kind::kTransfer, flow.bytes, after);
  tasks_.back().of = static_cast<int32_t>(flows_.size());
  flows_.push_back({.latency_seconds = flow.latency_seconds,
                    .bytes_per_second = RateOr(flow.bytes_per_second),
                    .first_link = static_cast<uint32_t>(flow_links_.size()),
                    .links = static_cast<uint32_t>(flow.links.size()),
                    .slowed_rank = flow.slowdown > 1 ? flow.slowed_rank : -1,
                    .slowdown = flow.slowdown});
  for (const int link : flow.links) {
    ANNULUS_CHECK(link >= 0 && static_cast<size_t>(link) < links_.size()) << "link " << link;
    flow_links_.push_back(link);
  }
  return id;
}

TaskId EventGraph::Join(absl::Span<const TaskId> after) { return Add(Kind::kJoin, 0, after); }

// One execution of a graph.
class EventRun {
 public:
  explicit EventRun(const EventGraph& graph)
      : graph_(graph),
        timings_(graph.tasks_.size()),
        waits_for_(graph.tasks_.size()),
        first_waiter_(graph.tasks_.size() + 1),
        waiters_(graph.after_.size()),
        slot_of_(graph.flows_.size(), kNotFlowing),
        place_(graph.flow_links_.size()),
        on_link_(graph.links_.size()),
        marked_(graph.links_.size()) {
    size_t ranks = graph.last_of_rank_.size();
    for (const EventGraph::FlowLimits& flow : graph.flows_)
      ranks = std::max(ranks, static_cast<size_t>(flow.slowed_rank + 1));
    computing_.resize(ranks);
  }

  std::vector<TaskTiming> Run() {
    FindWaiters();
    for (size_t t = 0; t < graph_.tasks_.size(); ++t) {
      if (waits_for_[t] == 0) ready_.push_back(static_cast<TaskId>(t));
    }
    StartReady(0);
    Reshare(0);
    while (!events_.empty()) {
      const double now = events_.top().time;
      while (!events_.empty() && events_.top().time <= Until(now)) {
        const Event event = events_.top();
        events_.pop();
        Handle(event, now);
        StartReady(now);
      }
      Reshare(now);
    }
    ANNULUS_CHECK(ended_ == graph_.tasks_.size()) << ended_ << " of " << graph_.tasks_.size() << " tasks end";
    return std::move(timings_);
  }

 private:
  static constexpr int32_t kNotFlowing = -1;

  // Bytes on their way.
  struct Flowing {
    TaskId task = kNoTask;
    double left = 0, per_second = 0, since = 0;
    double ends = kUnlimited;   // at this rate
    double alarm = kUnlimited;  // its first event
  };
  // What a rank computes, and the flows that slow it down.
  struct Computing {
    TaskId task = kNoTask;
    double left = 0, since = 0, ends = 0;  // seconds of work alone; when they were left; when they are done
    double slowdown = 1;
    std::vector<double> slowdowns = {};  // of the flows
  };
  enum class Happens : uint8_t { kEnd, kLatencyOver, kFlowEnds };
  struct Event {
    double time = 0;
    uint64_t number = 0;  // events of an instant happen in order of their making
    TaskId task = kNoTask;
    Happens happens = Happens::kEnd;
    friend bool operator>(const Event& a, const Event& b) {
      return a.time != b.time ? a.time > b.time : a.number > b.number;
    }
  };

  // Ranges of after_ and of their inverse.
  absl::Span<const TaskId> AfterOf(size_t task) const {
    const size_t begin = graph_.tasks_[task].first_after;
    const size_t end =
        task + 1 < graph_.tasks_.size() ? graph_.tasks_[task + 1].first_after : graph_.after_.size();
    return absl::MakeConstSpan(graph_.after_).subspan(begin, end - begin);
  }
  void FindWaiters() {
    for (const TaskId before : graph_.after_) ++first_waiter_[static_cast<size_t>(before) + 1];
    for (size_t t = 1; t < first_waiter_.size(); ++t) first_waiter_[t] += first_waiter_[t - 1];
    std::vector<uint32_t> next(first_waiter_.begin(), first_waiter_.end() - 1);
    for (size_t t = 0; t < graph_.tasks_.size(); ++t) {
      for (const TaskId before : AfterOf(t))
        waiters_[next[static_cast<size_t>(before)]++] = static_cast<TaskId>(t);
      waits_for_[t] = static_cast<uint32_t>(AfterOf(t).size());
    }
  }

  void Push(double time, Happens happens, TaskId task) {
    events_.push({time, events_made_++, task, happens});
  }

  // Also what begins because something without duration has ended.
  void StartReady(double now) {
    for (size_t i = 0; i < ready_.size(); ++i) Start(ready_[i], now);
    ready_.clear();
  }

  void Start(TaskId id, double now) {
    const EventGraph::Task& task = TaskOf(id);
    timings_[static_cast<size_t>(id)].start = now;
    if (task.kind != EventGraph::Kind::kTransfer) {
      if (task.amount == 0) return End(id, now);
      Computing& computing = computing_[static_cast<size_t>(task.of)];
      computing.task = id, computing.left = task.amount, computing.since = now;
      return SetEnd(&computing);
    }
    const double latency = FlowOf(id).latency_seconds;
    if (latency > 0) return Push(now + latency, Happens::kLatencyOver, id);
    BeginFlow(id, now);
  }

  void Handle(const Event& event, double now) {
    switch (event.happens) {
      case Happens::kEnd: {
        Computing& computing = computing_[static_cast<size_t>(TaskOf(event.task).of)];
        if (computing.task != event.task || computing.ends != event.time) return;  // it has another end since
        computing.task = kNoTask;
        return End(event.task, now);
      }
      case Happens::kLatencyOver:
        return BeginFlow(event.task, now);
      case Happens::kFlowEnds: {
        const int32_t slot = SlotOf(event.task);
        if (slot == kNotFlowing) return;
        Flowing& flow = flowing_[static_cast<size_t>(slot)];
        if (flow.alarm != event.time) return;  // there was an earlier one
        if (flow.ends <= Until(now)) return EndFlow(event.task, now);
        SetAlarm(&flow);
      }
    }
  }

  void End(TaskId id, double now) {
    timings_[static_cast<size_t>(id)].end = now;
    ++ended_;
    for (size_t i = first_waiter_[static_cast<size_t>(id)]; i < first_waiter_[static_cast<size_t>(id) + 1];
         ++i) {
      if (--waits_for_[static_cast<size_t>(waiters_[i])] == 0) ready_.push_back(waiters_[i]);
    }
  }

  void SetEnd(Computing* computing) {
    computing->ends = computing->since + computing->left * computing->slowdown;
    Push(computing->ends, Happens::kEnd, computing->task);
  }

  void SlowDown(const EventGraph::FlowLimits& flow, double now) {
    if (flow.slowed_rank < 0) return;
    Computing& computing = computing_[static_cast<size_t>(flow.slowed_rank)];
    computing.slowdowns.push_back(flow.slowdown);
    SetSlowdown(&computing, now);
  }
  void SpeedUp(const EventGraph::FlowLimits& flow, double now) {
    if (flow.slowed_rank < 0) return;
    Computing& computing = computing_[static_cast<size_t>(flow.slowed_rank)];
    std::vector<double>& all = computing.slowdowns;
    all.erase(std::find(all.begin(), all.end(), flow.slowdown));
    SetSlowdown(&computing, now);
  }
  void SetSlowdown(Computing* computing, double now) {
    double most = 1;
    for (const double slowdown : computing->slowdowns) most = std::max(most, slowdown);
    if (most == computing->slowdown) return;
    const double before = std::exchange(computing->slowdown, most);
    if (computing->task == kNoTask) return;
    computing->left = std::max(0.0, computing->left - (now - computing->since) / before);
    computing->since = now;
    SetEnd(computing);
  }

  void BeginFlow(TaskId id, double now) {
    const EventGraph::Task& task = TaskOf(id);
    if (task.amount == 0) return End(id, now);
    size_t slot = flowing_.size();
    if (free_.empty()) {
      flowing_.emplace_back();
    } else {
      slot = free_.back();
      free_.pop_back();
    }
    flowing_[slot] = {.task = id, .left = task.amount, .since = now};
    SlotOf(id) = static_cast<int32_t>(slot);
    begun_.push_back(id);
    const EventGraph::FlowLimits& flow = FlowOf(id);
    SlowDown(flow, now);
    for (uint32_t i = flow.first_link; i < flow.first_link + flow.links; ++i) {
      std::vector<Member>& members = on_link_[LinkAt(i)];
      place_[i] = static_cast<uint32_t>(members.size());
      members.push_back({id, i});
      Mark(LinkAt(i));
    }
  }

  void EndFlow(TaskId id, double now) {
    const EventGraph::FlowLimits& flow = FlowOf(id);
    SpeedUp(flow, now);
    for (uint32_t i = flow.first_link; i < flow.first_link + flow.links; ++i) {
      std::vector<Member>& members = on_link_[LinkAt(i)];
      members[place_[i]] = members.back();
      place_[members.back().entry] = place_[i];
      members.pop_back();
      Mark(LinkAt(i));
    }
    free_.push_back(static_cast<size_t>(std::exchange(SlotOf(id), kNotFlowing)));
    End(id, now);
  }

  void Mark(size_t link) {
    if (std::exchange(marked_[link], 1) == 0) marked_links_.push_back(link);
  }

  // Gives the flows that have begun and those of marked links their rates.
  void Reshare(double now) {
    for (const TaskId id : begun_) {
      if (SlotOf(id) != kNotFlowing) SetRate(id, now);
    }
    begun_.clear();
    for (const size_t link : marked_links_) {
      marked_[link] = 0;
      for (const Member& member : on_link_[link]) SetRate(member.task, now);
    }
    marked_links_.clear();
  }

  void SetRate(TaskId id, double now) {
    Flowing& flow = flowing_[static_cast<size_t>(SlotOf(id))];
    const EventGraph::FlowLimits& limits = FlowOf(id);
    double rate = limits.bytes_per_second;
    for (uint32_t i = limits.first_link; i < limits.first_link + limits.links; ++i) {
      const size_t link = LinkAt(i);
      rate = std::min(rate, graph_.links_[link] / static_cast<double>(on_link_[link].size()));
    }
    if (rate == flow.per_second) return;
    flow.left = std::max(0.0, flow.left - flow.per_second * (now - flow.since));
    if (rate == kUnlimited) flow.left = 0;
    flow.per_second = rate == kUnlimited ? 0 : rate;
    flow.since = now;
    flow.ends = flow.left == 0 ? now : now + flow.left / rate;
    if (flow.ends < flow.alarm) SetAlarm(&flow);
  }

  // A flow that has slowed down since is found to go on when its alarm goes off.
  void SetAlarm(Flowing* flow) {
    flow->alarm = flow->ends;
    Push(flow->ends, Happens::kFlowEnds, flow->task);
  }

  const EventGraph::Task& TaskOf(TaskId id) const { return graph_.tasks_[static_cast<size_t>(id)]; }
  const EventGraph::FlowLimits& FlowOf(TaskId id) const {
    return graph_.flows_[static_cast<size_t>(TaskOf(id).of)];
  }
  int32_t& SlotOf(TaskId id) { return slot_of_[static_cast<size_t>(TaskOf(id).of)]; }
  size_t LinkAt(uint32_t entry) const { return static_cast<size_t>(graph_.flow_links_[entry]); }

  struct Member {
    TaskId task = kNoTask;
    uint32_t entry = 0;  // of flow_links_
  };

  const EventGraph& graph_;
  std::vector<TaskTiming> timings_;
  std::vector<uint32_t> waits_for_;     // tasks
  std::vector<uint32_t> first_waiter_;  // of waiters_
  std::vector<TaskId> waiters_;
  std::vector<Computing> computing_;  // by rank
  std::vector<Flowing> flowing_;
  std::vector<size_t> free_;      // of flowing_
  std::vector<int32_t> slot_of_;  // by flow, of flowing_
  std::vector<uint32_t> place_;   // by entry of flow_links_: among the members of its link
  std::vector<std::vector<Member>> on_link_;
  std::vector<char> marked_;
  std::vector<size_t> marked_links_;
  std::vector<TaskId> begun_, ready_;
  std::priority_queue<Event, std::vector<Event>, std::greater<Event>> events_;
  uint64_t events_made_ = 0;
  size_t ended_ = 0;
};

std::vector<TaskTiming> EventGraph::Run() const { return EventRun(*this).Run(); }

}  // namespace annulus
