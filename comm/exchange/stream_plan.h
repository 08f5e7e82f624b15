#pragma once

// What one rank enqueues for a plan, worked out once and kept: on GPUs the host runs ahead of the device and
// may not spend long on a step.

#include <bitset>
#include <memory>
#include <string>
#include <vector>

#include "annulus/comm/exchange_transport.h"
#include "rounds.h"

namespace annulus {

struct StreamPlan {
  StreamPlan(const ExchangePlan& plan, int cp_rank);

  // Whether this is of that plan. A plan is a pure function of its problem and of how it was chosen, so its
  // name, pass and problem, everybody's slots and this rank's steps tell it from others.
  bool IsOf(const ExchangePlan& plan, int cp_rank) const;

  std::string name;
  Pass pass;
  ExchangeProblem problem;
  std::vector<HeadGroup> groups;
  RankPlan rank;
  std::vector<Launch> launches;
  std::bitset<kTransferLanes> lanes;  // those that some rank uses
  std::vector<std::string> texts;     // by step
  std::vector<RowRange> rows;         // by step, of transfers: in the slot
  // By step, of computing steps: the transfers to wait for (one that an earlier computing step waits for
  // needs no second wait).
  std::vector<std::vector<int>> compute_waits;
  std::vector<bool> is_awaited;  // by step: whether a step of another lane waits for it
  // By step, of transfers: the first computing step that waits for it; the number of steps if none does.
  std::vector<size_t> needed_by;

  // A slot that receives lies in the pool of its rank, which peers write; others have no place there.
  struct PoolSlot {
    int slot = -1;
    size_t kind = 0;
  };
  std::vector<SlotSpec> kinds;               // of slots that receive, each once
  std::vector<int64_t> kind_rows;            // by kind
  std::vector<std::vector<PoolSlot>> pools;  // by rank
  struct PeerRows {
    size_t place = 0;                // of the receiver's pool
    int64_t begin = 0;               // in that slot
    bool taken_as_it_comes = false;  // a kernel of the receiver may wait for it (ArrivesDuring)
  };
  std::vector<PeerRows> peer_rows;  // by step, of kSend
  int messages = 0;                 // all numbers of messages are below it

 private:
  void AddWaits();
  void AddPools(const ExchangePlan& plan);
  void AddPeerRows(const ExchangePlan& plan, int cp_rank);
  size_t KindOf(const ExchangePlan& plan, const SlotSpec& slot);

  std::vector<std::vector<SlotSpec>> slots_;  // by rank
};

// Where the fields of the slots that receive lie in the pools of all ranks, which is the same on every rank
// because what slots hold is.
class PoolLayout {
 public:
  PoolLayout() = default;
  PoolLayout(const StreamPlan& plan, const SlotSource& source);

  const std::vector<SlotField>& FieldsOf(size_t kind) const { return kinds_[kind].fields; }
  int64_t OffsetOf(int cp_rank, size_t place, size_t field) const {
    const Place& at = pools_[static_cast<size_t>(cp_rank)][place];
    return at.offset + kinds_[at.kind].offsets[field];
  }
  int64_t bytes() const { return bytes_; }  // of a pool that suffices on every rank

 private:
  struct Kind {
    std::vector<SlotField> fields;
    std::vector<int64_t> offsets;  // by field
    int64_t bytes = 0;
  };
  struct Place {
    size_t kind = 0;
    int64_t offset = 0;
  };
  std::vector<Kind> kinds_;
  std::vector<std::vector<Place>> pools_;  // by rank
  int64_t bytes_ = 0;
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
