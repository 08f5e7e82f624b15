#pragma once

// Counts what the ranks of a job send, inside hosts and between them.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "annulus/comm/communicator.h"

namespace annulus {

struct SentTraffic {
  int64_t inside_hosts_bytes = 0, between_hosts_bytes = 0;
  friend bool operator==(const SentTraffic&, const SentTraffic&) = default;
};

// Of one rank; used by its thread alone.
class TrafficCounter {
 public:
  // `hosts`: of each world rank.
  TrafficCounter(std::vector<std::string> hosts, int world_rank)
      : hosts_(std::move(hosts)), world_rank_(world_rank) {}

  int world_rank() const { return world_rank_; }
  void Add(int to_world_rank, int64_t bytes);
  SentTraffic Take();  // since the last call

 private:
  const std::vector<std::string> hosts_;
  const int world_rank_;
  SentTraffic sent_;
};

// The same group, whose calls are counted: messages to where they go; collectives as a ring of the group's
// ranks would carry them, which sends no more than any other way. Groups split from it count too. Collective.
absl::StatusOr<Communicator> WithTraffic(Communicator group, std::shared_ptr<TrafficCounter> counter);

}  // namespace annulus
