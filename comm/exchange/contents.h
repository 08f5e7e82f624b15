#pragma once

// What every slot holds while a plan runs, symbolically: for each row the block that it belongs to and, for
// gradients, which query chunks have been added. (A row of a block lies in one key chunk, so the set of query
// chunks says which (query chunk, key chunk) contributions the row has.)

#include <vector>

#include "annulus/comm/exchange_plan.h"

namespace annulus {

class PlanContents {
 public:
  explicit PlanContents(const ExchangePlan& plan);  // every home slot holds its block

  // FailedPrecondition if the step does not find what it needs.
  absl::Status Compute(int cp_rank, size_t step);
  absl::Status Move(int from_rank, size_t send, int to_rank, size_t receive);

  // FailedPrecondition unless all pairs were computed and, in backward, home slots hold all of their
  // gradient.
  absl::Status CheckResult() const;

 private:
  struct Content {
    int block = -1;               // -1: nothing yet
    std::vector<uint64_t> added;  // bit i: query chunk i
    friend bool operator==(const Content&, const Content&) = default;
  };
  struct Segment {
    RowRange rows;
    Content content;
  };
  using Slot = std::vector<Segment>;  // in order, covering the block

  // The segments of `rows`, after splitting at both ends.
  static std::vector<Segment*> Cut(Slot* slot, const RowRange& rows);
  Slot& SlotOf(int cp_rank, int slot) {
    return slots_[static_cast<size_t>(cp_rank)][static_cast<size_t>(slot)];
  }
  absl::Status Attend(int cp_rank, size_t step);
  absl::Status AddGradient(int cp_rank, size_t step, const BlockPair& pair);
  absl::Status Reduce(int cp_rank, size_t step);
  absl::Status Wrong(int cp_rank, size_t step, const std::string& what) const;

  const ExchangePlan& plan_;
  const size_t words_;                    // of a set of query chunks
  std::vector<std::vector<Slot>> slots_;  // [rank][slot]
  std::vector<bool> computed_;            // [chunks * chunks]
};

}  // namespace annulus
