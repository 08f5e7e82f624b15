#pragma once

// The list of one rank's steps while it is built.

#include <vector>

#include "annulus/comm/exchange_plan.h"

namespace annulus {

// Place of a step in its rank's list. Both ends of a message have the same, so the messages of a pair of
// ranks are listed in one order; and every step comes after all that it waits for.
enum Phase { kMoveOperand, kCompute, kMoveResult, kJoin, kJoinHome };
struct Place {
  int step = 0;
  Phase phase = kMoveOperand;
  int side = 0, block = 0, part = 0;
  bool home = false;  // a result that goes home
  int64_t row = 0;
  friend auto operator<=>(const Place&, const Place&) = default;
};

// Steps are named by the order in which they are added.
class StepList {
 public:
  int AddSlot(const SlotSpec& spec);
  int Add(const Place& place, Step step);
  const Step& step(int id) const { return plan_.steps[static_cast<size_t>(id)]; }
  // Those of `ids` whose rows these overlap.
  std::vector<int> Touching(const std::vector<int>& ids, const RowRange& rows) const;

  RankPlan Finish();  // sorted by place; `after` names places in the list

 private:
  RankPlan plan_;
  std::vector<Place> places_;
};

}  // namespace annulus
