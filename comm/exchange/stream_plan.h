#pragma once

// What one rank enqueues for a plan, worked out once and kept: on GPUs the host runs ahead of the device and
// may not spend long on a step.

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "annulus/comm/exchange_plan.h"
#include "rounds.h"

namespace annulus {

// Where a slot that receives lies in its rank's pool: behind this many others. Every rank knows the pools of
// all.
struct PoolPlace {
  int kv_slots = 0, grad_slots = 0;
};

// Of one slot in a pool.
struct SlotBytes {
  int64_t kv = 0, grad = 0;
};
inline int64_t OffsetOf(const PoolPlace& place, const SlotBytes& bytes) {
  return place.kv_slots * bytes.kv + place.grad_slots * bytes.grad;
}

struct StreamPlan {
  StreamPlan(const ExchangePlan& plan, int cp_rank);

  // Whether this is of that plan. A plan is a pure function of its problem, so its name, pass and problem and
  // this rank's steps tell it from others.
  bool IsOf(const ExchangePlan& plan, int cp_rank) const;
  // Of the pool that suffices on every rank.
  int64_t PoolBytes(const SlotBytes& bytes) const;

  std::string name;
  Pass pass;
  ExchangeProblem problem;
  RankPlan rank;
  std::vector<Launch> launches;
  std::vector<std::string> texts;  // by step
  // By step, of computing steps: the transfers to wait for (one that an earlier computing step waits for
  // needs no second wait).
  std::vector<std::vector<int>> compute_waits;
  std::vector<bool> is_awaited;  // by step: whether a step of another lane waits for it

  // Non-home slots that receive: place in the own pool. Slots that no message reaches have none.
  std::vector<std::optional<PoolPlace>> pool;  // by slot
  std::vector<PoolPlace> peer_place;           // by step, of kSend: the receiver's slot in its pool
  std::vector<PoolPlace> pool_ends;            // by rank
  int messages = 0;                            // all numbers of messages are below it
};

// Those used last. A sequence of plans that repeats from step to step is worked out once.
class StreamPlans {
 public:
  const StreamPlan& Of(const ExchangePlan& plan, int cp_rank);  // valid until the next call

 private:
  static constexpr size_t kKept = 32;  // forward and backward of a few windows, and batches of a few masks
  std::vector<std::unique_ptr<const StreamPlan>> plans_;  // the last used first
};

}  // namespace annulus
