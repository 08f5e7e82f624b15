#include "step_list.h"

#include <algorithm>
#include <numeric>

#include "row_set.h"

namespace annulus {

int StepList::AddSlot(const SlotSpec& spec) {
  plan_.slots.push_back(spec);
  return static_cast<int>(plan_.slots.size()) - 1;
}

int StepList::Add(const Place& place, Step step) {
  places_.push_back(place);
  plan_.steps.push_back(std::move(step));
  return static_cast<int>(plan_.steps.size()) - 1;
}

std::vector<int> StepList::Touching(const std::vector<int>& ids, const RowRange& rows) const {
  std::vector<int> result;
  for (const int id : ids) {
    if (Overlap(step(id).rows.rows, rows)) result.push_back(id);
  }
  return result;
}

RankPlan StepList::Finish() {
  std::vector<int> order(places_.size()), position(places_.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return places_[static_cast<size_t>(a)] < places_[static_cast<size_t>(b)];
  });
  for (size_t i = 0; i < order.size(); ++i) position[static_cast<size_t>(order[i])] = static_cast<int>(i);
  RankPlan sorted{.slots = std::move(plan_.slots)};
  for (const int id : order) {
    sorted.steps.push_back(std::move(plan_.steps[static_cast<size_t>(id)]));
    std::vector<int>& after = sorted.steps.back().after;
    for (int& dependency : after) dependency = position[static_cast<size_t>(dependency)];
    std::sort(after.begin(), after.end());
    after.erase(std::unique(after.begin(), after.end()), after.end());
  }
  return sorted;
}

}  // namespace annulus
