#pragma once

// The time of a plan on a machine, by discrete events.

#include <functional>
#include <string>
#include <vector>

#include "annulus/comm/exchange_plan.h"

namespace annulus {

struct ExchangeCost {
  // Of a computing step, launches included.
  std::function<double(int cp_rank, size_t step)> compute_seconds;
  // Of one row of a slot; and whole messages at best rate.
  std::function<double(const SlotSpec&)> row_bytes;
  double egress_bytes_per_second = 0;   // of one rank, to all its peers together; 0: unlimited
  double ingress_bytes_per_second = 0;  // 0: unlimited
  // One link from each rank to each other: rate by (from, to); null or 0: unlimited.
  std::function<double(int from, int to)> link_bytes_per_second;
  double message_seconds = 0;  // latency: from the end of a send to the end of its receive
  // Time that a message takes of its link besides its bytes, which makes small messages slow.
  double message_overhead_seconds = 0;
};

struct StepTiming {
  double start = 0, end = 0;  // seconds
};

struct Simulation {
  double makespan = 0;
  std::vector<double> compute;      // per rank, seconds spent computing
  std::vector<double> exposed;      // per rank, seconds its computing waited for transfers, the tail included
  std::vector<int64_t> bytes_sent;  // per rank
  std::vector<std::vector<StepTiming>> steps;  // [rank][step]
};

// Discrete-event run of a valid plan: one compute lane a rank; transfers share links, egress and ingress, and
// the lanes of rounds.h, in order of start.
Simulation Simulate(const ExchangePlan& plan, const ExchangeCost& cost);

// A timeline of `columns` characters for each rank and lane.
std::string Timeline(const ExchangePlan& plan, const Simulation& simulation, int columns = 100);

// The same as a picture: self-contained SVG with a lane for computing, operands and results of each rank,
// titles naming every step and its times; readable in light and dark.
std::string TimelineSvg(const ExchangePlan& plan, const Simulation& simulation);

}  // namespace annulus
