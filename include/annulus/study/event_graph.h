#pragma once

// Discrete events: computing tasks on ranks and transfers between them, each beginning when those before it
// have ended, transfers sharing the links that they pass.
//
// A rank computes one task at a time, in the order in which they were added (a stream), slower while
// transfers flow that take some of what it computes with. A transfer begins when all of `after` are done,
// waits its latency, then its bytes flow along its links. All flows at once: each link divides its rate
// evenly among its flows, and a flow moves at the least of its shares (as in exchange_simulate.h). The same
// inputs give the same bits.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace annulus {

using TaskId = int32_t;
inline constexpr TaskId kNoTask = -1;  // allowed in `after`; done from the start

struct TaskTiming {
  double start = 0, end = 0;  // seconds
};

class EventGraph {
 public:
  // bytes_per_second 0: unlimited. Returns its number.
  int AddLink(double bytes_per_second);

  TaskId Compute(int rank, double seconds, absl::Span<const TaskId> after);
  // rate: of the flow alone at most; 0: as its links allow. Zero bytes take the latency.
  struct Flow {
    double bytes = 0;
    double latency_seconds = 0;
    double bytes_per_second = 0;
    std::vector<int> links = {};
    // The rank whose computing takes so many times as long meanwhile; of several such flows the most counts.
    int slowed_rank = -1;
    double slowdown = 1;
  };
  TaskId Transfer(const Flow& flow, absl::Span<const TaskId> after);
  TaskId Join(absl::Span<const TaskId> after);  // takes no time

  // Of every task, by its id. Tasks only wait for earlier ones, so there is always an end.
  std::vector<TaskTiming> Run() const;

  size_t tasks() const { return tasks_.size(); }

 private:
  friend class EventRun;
  enum class Kind : uint8_t { kCompute, kTransfer, kJoin };
  struct Task {
    double amount = 0;         // seconds, or bytes
    uint32_t first_after = 0;  // of after_
    int32_t of = -1;           // the rank that computes; of a transfer its place in flows_
    Kind kind = Kind::kJoin;
  };
  struct FlowLimits {
    double latency_seconds = 0, bytes_per_second = 0;
    uint32_t first_link = 0, links = 0;  // of flow_links_
    int32_t slowed_rank = -1;
    double slowdown = 1;
  };
  TaskId Add(Kind kind, double amount, absl::Span<const TaskId> after);

  std::vector<Task> tasks_;
  std::vector<TaskId> after_;  // of all tasks, one behind the other
  std::vector<FlowLimits> flows_;
  std::vector<int> flow_links_;
  std::vector<double> links_;         // rates
  std::vector<TaskId> last_of_rank_;  // computing
};

}  // namespace annulus
