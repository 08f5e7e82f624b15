#pragma once

// The links of a cluster as an EventGraph has them, and what groups of ranks send along them.
//
// Inside a host a rank has a link out and one in, at the best rate of the profile's links; for other hosts
// another pair, and all ranks of a host share its own, each way, where the profile knows one. Consecutive
// ranks are on a host.
//
// Collectives. NCCL moves in rings, each leaving a host from another of its ranks: of what a ring's rank
// sends, a host's ranks together send as much to the next host. MPI sends each part to its rank directly.
// Either way every rank sends the same, and gets as much as it sends, so that one flow is both. Ranks compute
// slower while they take part in one, as the profile says.
//
// Both grow with the group, n ranks on h hosts, besides their bytes:
//   a ring      start + (n - h) step inside + (h - 1) step between: NCCL's own formula (src/graph/tuning.cc)
//   directly    start + n - 1 messages one behind the other, none faster than the smallest of the profile
// A few numbers are summed along a tree by NCCL, start + 2 ((n / h - 1) step inside + log2(h) step between),
// and directly to all and back by MPI. Start is a message's time; measured rates of collectives have it in
// them, and the steps or messages of the group that they were measured in: here come those beyond.

#include <cstdint>
#include <vector>

#include "annulus/parallel/machine_profile.h"
#include "annulus/study/event_graph.h"

namespace annulus {

// What a rank's link carries at most: of large messages, by the fastest way of moving them. 0: not known.
double BestRate(const std::vector<LinkRate>& links, const std::vector<RatePoint>& collectives);

// Ranks that act together, in the order of their places in the group.
struct RankGroup {
  std::vector<int> ranks = {};    // those that are simulated
  std::vector<int> on_host = {};  // of each of them: members on its host, itself included
  int size = 1;                   // all of them
  int hosts = 1;
  int64_t ways_between = 0;  // of the connections of a collective, those between hosts
  int64_t ways = 1;
};

// Bytes sent by all ranks together.
struct SentBytes {
  int64_t inside = 0, between = 0;  // hosts
  SentBytes& operator+=(const SentBytes& more) {
    inside += more.inside;
    between += more.between;
    return *this;
  }
  friend SentBytes operator*(int64_t times, const SentBytes& sent) {
    return {times * sent.inside, times * sent.between};
  }
};

// What one rank sends and gets.
struct RankTraffic {
  SentBytes out, in;
};

class Cluster {
 public:
  enum class Pattern { kRing, kDirect };  // of collectives

  // Ranks below `simulated` are; all others do as one of them does. `graph` outlives the cluster.
  Cluster(int ranks, int simulated, const MachineProfile& machine, Pattern pattern, EventGraph* graph);

  int HostOf(int rank) const;
  RankGroup Group(const std::vector<int>& ranks) const;

  // A collective in which all ranks together send so much; ends for all when all have. `begin` itself where
  // nothing is sent.
  TaskId Collective(const RankGroup& group, int64_t bytes, TaskId begin);
  SentBytes SentIn(const RankGroup& group, int64_t bytes) const;
  // A sum of a few numbers.
  TaskId SmallSum(const RankGroup& group, TaskId begin);

  // The messages of a rank: one or several flows, appended to `flows`.
  void Messages(int rank, const RankTraffic& traffic, TaskId begin, std::vector<TaskId>* flows);

 private:
  struct Ports {
    int out = 0, in = 0;
  };
  enum class Where { kInside, kBetween };
  const LinkRate* LinkOf(Where where) const;
  const std::vector<RatePoint>& CollectivesOf(Where where) const;
  double StartSeconds(Where where) const;
  double StepSeconds(Where where) const;
  double MessageGap(Where where) const;
  double LatencyOf(Where where, const RankGroup& group, int peers) const;
  double RateOf(Where where, double bytes, int peers) const;
  std::vector<int> LinksOf(Where where, int rank, bool out, bool in) const;
  void AddFlow(Where where, int rank, int64_t out, int64_t in, TaskId begin, std::vector<TaskId>* flows);

  const MachineProfile& machine_;
  Pattern pattern_;
  EventGraph* graph_;
  int simulated_;
  int ranks_per_host_;
  int measured_peers_;                   // of a rank, when the profile's collectives inside were measured
  std::vector<Ports> inside_, between_;  // by rank
  std::vector<Ports> host_links_;        // by host; of hosts without a shared rate unlimited
};

}  // namespace annulus
