#pragma once

// The time of a plan on a machine, by discrete events.
//
// Computing. A rank computes one step at a time, in order of the list. A step that takes keys as they come
// computes on what is there and waits for more in between, which is not counted as computing.
//
// Messages. A message is ready when both of its ends are (rendezvous). Operands and results have a lane each
// from every rank to every other; a lane moves one message at a time, in order of readiness. A message holds
// its lane for the overhead, then its bytes flow. All flows at once: a link, the egress of a rank and the
// ingress of a rank each divide their rate evenly among the flows that they serve, and a flow moves at the
// least of its three shares. What a flow limited elsewhere leaves of its share stays unused, which is exact
// where all ranks do alike. So traffic to both neighbours of a ring takes as long as to one of them where
// egress is the bottleneck (a switch), and half as long where the links are.
//
// Transports. Host and copy engines order messages only by readiness, though copy engines also hand arrivals
// on in order (rounds.h): computing needs them in that order anyway. NCCL runs rounds: all transfers of a
// round start and end together, one round of a lane after the other.

#include <functional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "annulus/comm/exchange_plan.h"

namespace annulus {

enum class MessageOrder { kFree, kRounds };

struct ExchangeCost {
  // Of a computing step, launches included.
  std::function<double(int cp_rank, size_t step)> compute_seconds = {};
  // Of a step that takes keys as they come (KeyArrival::kDuring): what of its compute_seconds needs those of
  // the receive. Null: it waits for all of them first.
  std::function<double(int cp_rank, size_t step, size_t receive)> arrival_seconds = {};
  // Of one row of a slot.
  std::function<double(const SlotSpec&)> row_bytes = {};
  double egress_bytes_per_second = 0;   // of one rank, to all its peers together; 0: unlimited
  double ingress_bytes_per_second = 0;  // 0: unlimited
  // One link from each rank to each other: rate by (from, to); null or 0: unlimited.
  std::function<double(int from, int to)> link_bytes_per_second = {};
  double message_seconds = 0;  // latency: from the end of a send to the end of its receive
  // Time that a message takes of its lane before its bytes, which makes small messages slow.
  double message_overhead_seconds = 0;
  MessageOrder order = MessageOrder::kFree;
  double computing_slowdown = 1;  // of a rank's computing while it sends or receives
};

struct StepTiming {
  double start = 0, end = 0;  // seconds; of transfers: from taking the lane
};

enum class TimeSource { kPredicted, kMeasured };

// Times of a plan's steps: predicted, or those of an execution (exchange_timeline.h).
struct Simulation {
  TimeSource source = TimeSource::kPredicted;
  double makespan = 0;
  std::vector<double> compute;      // per rank, seconds spent computing
  std::vector<double> exposed;      // per rank, seconds its computing waited for transfers, the tail included
  std::vector<int64_t> bytes_sent;  // per rank
  std::vector<std::vector<StepTiming>> steps;  // [rank][step]
};

const char* Name(TimeSource source);  // "predicted", "measured"

// Of a valid plan. The same inputs give the same bits.
Simulation Simulate(const ExchangePlan& plan, const ExchangeCost& cost);

// A timeline of `columns` characters for each rank and lane: computing, by the blocks whose queries or keys
// it is on, and what arrives.
std::string Timeline(const ExchangePlan& plan, const Simulation& simulation, int columns = 100);

// The same as a picture: self-contained SVG with a lane for computing, operands and results of each rank,
// titles naming every step and its times; readable in light and dark. `note` stands before the heading.
std::string TimelineSvg(const ExchangePlan& plan, const Simulation& simulation, absl::string_view note = "");

}  // namespace annulus
