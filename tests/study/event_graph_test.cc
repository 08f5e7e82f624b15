// Discrete events against times worked out by hand, and against a simulation that knows no events: it finds
// every rate anew at each instant.

#include "annulus/study/event_graph.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>

namespace annulus {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The same tasks as plain data.
struct PlainTask {
  bool transfer = false;
  int rank = -1;      // computing; -1: a join
  double amount = 0;  // seconds, or bytes
  double latency = 0, limit = 0;
  std::vector<int> links = {};
  std::vector<TaskId> after = {};
};

struct PlainGraph {
  std::vector<double> links;
  std::vector<PlainTask> tasks;

  EventGraph Build() const {
    EventGraph graph;
    for (const double link : links) graph.AddLink(link);
    for (const PlainTask& task : tasks) {
      if (task.transfer) {
        graph.Transfer({.bytes = task.amount,
                        .latency_seconds = task.latency,
                        .bytes_per_second = task.limit,
                        .links = task.links},
                       task.after);
      } else if (task.rank >= 0) {
        graph.Compute(task.rank, task.amount, task.after);
      } else {
        graph.Join(task.after);
      }
    }
    return graph;
  }
};

class Reference {
 public:
  explicit Reference(const PlainGraph& graph) : graph_(graph), states_(graph.tasks.size()) {}

  std::vector<TaskTiming> Run() {
    while (true) {
      while (StartAndEnd()) {
      }
      const double step = Next();
      if (step == kInfinity) break;
      std::vector<double> rates;  // before any of them changes
      for (size_t t = 0; t < states_.size(); ++t) rates.push_back(RateOf(t));
      for (size_t t = 0; t < states_.size(); ++t) {
        State& state = states_[t];
        if (!state.running) continue;
        if (state.latency > 0) {
          state.latency = state.latency <= step * (1 + 1e-13) ? 0 : state.latency - step;
        } else {
          const double moved = rates[t] * step;
          state.left = state.left <= moved * (1 + 1e-13) ? 0 : state.left - moved;
        }
      }
      now_ += step;
    }
    std::vector<TaskTiming> timings;
    for (const State& state : states_) {
      EXPECT_TRUE(state.done);
      timings.push_back(state.timing);
    }
    return timings;
  }

 private:
  struct State {
    bool running = false, done = false;
    double left = 0, latency = 0;
    TaskTiming timing = {};
  };

  bool Ready(size_t t) const {
    const PlainTask& task = graph_.tasks[t];
    for (const TaskId before : task.after) {
      if (before != kNoTask && !states_[static_cast<size_t>(before)].done) return false;
    }
    for (size_t i = 0; i < t && task.rank >= 0; ++i) {
      if (graph_.tasks[i].rank == task.rank && !states_[i].done) return false;
    }
    return true;
  }

  bool StartAndEnd() {
    bool changed = false;
    for (size_t t = 0; t < states_.size(); ++t) {
      State& state = states_[t];
      if (!state.running && !state.done && Ready(t)) {
        state = {.running = true, .left = graph_.tasks[t].amount, .latency = graph_.tasks[t].latency};
        state.timing.start = now_;
        changed = true;
      }
      if (state.running && state.latency == 0 && state.left == 0) {
        state.running = false;
        state.done = true;
        state.timing.end = now_;
        changed = true;
      }
    }
    return changed;
  }

  bool Flows(size_t t) const {
    return graph_.tasks[t].transfer && states_[t].running && states_[t].latency == 0;
  }

  double RateOf(size_t t) const {
    const PlainTask& task = graph_.tasks[t];
    if (!task.transfer) return 1;
    double rate = task.limit > 0 ? task.limit : 1e30;
    for (const int link : task.links) {
      int sharing = 0;
      for (size_t i = 0; i < states_.size(); ++i) {
        const std::vector<int>& links = graph_.tasks[i].links;
        if (Flows(i) && std::find(links.begin(), links.end(), link) != links.end()) ++sharing;
      }
      rate = std::min(rate, graph_.links[static_cast<size_t>(link)] / sharing);
    }
    return rate;
  }

  double Next() const {
    double next = kInfinity;
    for (size_t t = 0; t < states_.size(); ++t) {
      if (!states_[t].running) continue;
      next = std::min(next, states_[t].latency > 0 ? states_[t].latency : states_[t].left / RateOf(t));
    }
    return next;
  }

  const PlainGraph& graph_;
  std::vector<State> states_;
  double now_ = 0;
};

TEST(EventGraph, TwoFlowsShareALink) {
  EventGraph graph;
  const int link = graph.AddLink(10);
  graph.Transfer({.bytes = 20, .links = {link}}, {});
  graph.Transfer({.bytes = 50, .links = {link}}, {});
  const std::vector<TaskTiming> times = graph.Run();
  EXPECT_DOUBLE_EQ(times[0].end, 4);  // 5 a second each
  EXPECT_DOUBLE_EQ(times[1].end, 7);  // 30 are left at 4, alone
}

// Three flows leave one rank to others with links of their own.
TEST(EventGraph, FlowsOfDifferentSizesShareWhatTheyAllPass) {
  EventGraph graph;
  const int egress = graph.AddLink(12);
  std::vector<int> ingress;
  for (int i = 0; i < 3; ++i) ingress.push_back(graph.AddLink(5));
  const double bytes[] = {4, 12, 25};
  for (size_t i = 0; i < 3; ++i) graph.Transfer({.bytes = bytes[i], .links = {egress, ingress[i]}}, {});
  const std::vector<TaskTiming> times = graph.Run();
  EXPECT_DOUBLE_EQ(times[0].end, 1);                       // 4 a second each
  EXPECT_DOUBLE_EQ(times[1].end, 1 + 8 / 5.0);             // then 5, of a share of 6
  EXPECT_DOUBLE_EQ(times[2].end, 1 + 8 / 5.0 + 13 / 5.0);  // and 5, of 12
}

TEST(EventGraph, ChainsAndStreams) {
  EventGraph graph;
  const int link = graph.AddLink(0);
  const TaskId first = graph.Compute(0, 2, {});
  const TaskId moved = graph.Transfer(
      {.bytes = 6, .latency_seconds = 1, .bytes_per_second = 3, .links = {link}}, {first, kNoTask});
  const TaskId other = graph.Compute(1, 1, {moved});
  const TaskId second = graph.Compute(0, 3, {});      // right behind the first
  const TaskId third = graph.Compute(0, 4, {other});  // waits for rank 1
  const TaskId fourth = graph.Compute(0, 1, {});      // in order, though nothing else holds it
  const TaskId empty = graph.Transfer({.latency_seconds = 0.5, .links = {link}}, {second});
  const TaskId all = graph.Join({fourth, empty});
  const std::vector<TaskTiming> times = graph.Run();
  const auto expect = [&](TaskId task, double start, double end) {
    EXPECT_DOUBLE_EQ(times[static_cast<size_t>(task)].start, start) << task;
    EXPECT_DOUBLE_EQ(times[static_cast<size_t>(task)].end, end) << task;
  };
  expect(first, 0, 2);
  expect(moved, 2, 5);
  expect(other, 5, 6);
  expect(second, 2, 5);
  expect(third, 6, 10);
  expect(fourth, 10, 11);
  expect(empty, 5, 5.5);
  expect(all, 11, 11);
  EXPECT_EQ(graph.tasks(), times.size());
}

TEST(EventGraph, WhatTakesNoTimeEndsAtOnce) {
  EventGraph graph;
  TaskId last = graph.Compute(0, 1, {});
  for (int i = 0; i < 1000; ++i) {
    last = graph.Join({last});
    last = graph.Transfer({}, {last});
    last = graph.Transfer({.bytes = 1e9}, {last});  // without limits
    last = graph.Compute(i, 0, {last});
  }
  EXPECT_DOUBLE_EQ(graph.Run().back().end, 1);
  EXPECT_TRUE(EventGraph().Run().empty());
}

PlainGraph RandomGraph(uint32_t seed) {
  std::mt19937 random(seed);
  const auto below = [&](uint32_t n) { return static_cast<int>(random() % n); };
  PlainGraph graph;
  for (int i = 0, n = 1 + below(6); i < n; ++i) graph.links.push_back(1 + below(9));
  for (int t = 0, n = 3 + below(38); t < n; ++t) {
    PlainTask task;
    const int kind = below(5);
    task.transfer = kind >= 2;
    if (kind < 2) task.rank = below(4);
    if (kind == 4 && below(3) == 0) task = {};  // a join
    if (task.transfer || task.rank >= 0) task.amount = below(4) == 0 ? 0 : (1 + below(50)) / 7.0;
    if (task.transfer) {
      task.latency = below(2) == 0 ? 0 : below(20) / 11.0;
      task.limit = below(3) == 0 ? 1 + below(4) : 0;
      for (size_t link = 0; link < graph.links.size(); ++link) {
        if (below(3) == 0) task.links.push_back(static_cast<int>(link));
      }
      if (task.links.empty()) task.limit = 2;
    }
    for (int i = 0, after = below(4); i < after; ++i)
      task.after.push_back(below(static_cast<uint32_t>(t + 1)) - 1);
    graph.tasks.push_back(task);
  }
  return graph;
}

TEST(EventGraph, IsASimulationThatFindsAllRatesAtEachInstant) {
  int transfers = 0;
  for (uint32_t seed = 0; seed < 400; ++seed) {
    const PlainGraph plain = RandomGraph(seed);
    const std::vector<TaskTiming> expected = Reference(plain).Run(), got = plain.Build().Run();
    ASSERT_EQ(got.size(), expected.size());
    for (size_t t = 0; t < got.size(); ++t) {
      transfers += plain.tasks[t].transfer ? 1 : 0;
      EXPECT_NEAR(got[t].start, expected[t].start, 1e-9) << "seed " << seed << " task " << t;
      EXPECT_NEAR(got[t].end, expected[t].end, 1e-9) << "seed " << seed << " task " << t;
    }
  }
  EXPECT_GT(transfers, 2000);
}

TEST(EventGraph, TheSameInputsGiveTheSameBits) {
  const PlainGraph plain = RandomGraph(7);
  const std::vector<TaskTiming> first = plain.Build().Run(), second = plain.Build().Run();
  for (size_t t = 0; t < first.size(); ++t) {
    EXPECT_EQ(first[t].start, second[t].start);
    EXPECT_EQ(first[t].end, second[t].end);
  }
}

// Rank 0 computes 4 seconds of work. From 1 to 3 a flow makes it twice as slow, from 2 to 2.5 another one
// three times: of the work 1, 1/2, 1/6 and 1/4 second are done by 3. Rank 1 is left alone.
TEST(EventGraph, FlowsSlowDownComputing) {
  EventGraph graph;
  const TaskId slowed = graph.Compute(0, 4, {}), alone = graph.Compute(1, 4, {});
  const EventGraph::Flow halves{
      .bytes = 2, .latency_seconds = 1, .bytes_per_second = 1, .slowed_rank = 0, .slowdown = 2};
  graph.Transfer(halves, {});
  graph.Transfer({.bytes = 0.5, .latency_seconds = 2, .bytes_per_second = 1, .slowed_rank = 0, .slowdown = 3},
                 {});
  const TaskId next = graph.Compute(0, 1, {});
  const std::vector<TaskTiming> times = graph.Run();
  const double done = 1 + 0.5 + 0.5 / 3 + 0.25;
  EXPECT_NEAR(times[static_cast<size_t>(slowed)].end, 3 + (4 - done), 1e-12);
  EXPECT_EQ(times[static_cast<size_t>(alone)].end, 4);
  EXPECT_NEAR(times[static_cast<size_t>(next)].end, 3 + (4 - done) + 1, 1e-12);
}

// A flow that slows down a rank which computes only later, and one that ends with the computing.
TEST(EventGraph, WhatComputesLaterIsSlowedDownAsWell) {
  EventGraph graph;
  const TaskId before = graph.Compute(1, 1, {});
  graph.Transfer({.bytes = 3, .bytes_per_second = 1, .slowed_rank = 0, .slowdown = 2}, {});
  const TaskId first = graph.Compute(0, 1, {before}), second = graph.Compute(0, 1, {first});
  const std::vector<TaskTiming> times = graph.Run();
  EXPECT_NEAR(times[static_cast<size_t>(first)].end, 3, 1e-12);
  EXPECT_NEAR(times[static_cast<size_t>(second)].end, 4, 1e-12);
}

}  // namespace
}  // namespace annulus
