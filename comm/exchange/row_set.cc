#include "row_set.h"

#include <algorithm>

#include "annulus/base/check.h"

namespace annulus {

void RowSet::Add(const RowRange& rows) {
  if (rows.empty()) return;
  std::vector<RowRange> merged;
  RowRange grown = rows;
  for (const RowRange& range : ranges_) {
    if (range.end < grown.begin || grown.end < range.begin) {
      merged.push_back(range);
    } else {
      grown = {std::min(range.begin, grown.begin), std::max(range.end, grown.end)};
    }
  }
  const auto by_begin = [](const RowRange& a, const RowRange& b) { return a.begin < b.begin; };
  merged.insert(std::upper_bound(merged.begin(), merged.end(), grown, by_begin), grown);
  ranges_ = std::move(merged);
}

void RowSet::Add(const RowSet& other) {
  for (const RowRange& range : other.ranges_) Add(range);
}

RowSet RowSet::Intersect(const RowSet& other) const {
  RowSet result;
  for (const RowRange& a : ranges_) {
    for (const RowRange& b : other.ranges_) result.Add({std::max(a.begin, b.begin), std::min(a.end, b.end)});
  }
  return result;
}

RowSet RowSet::Subtract(const RowSet& other) const {
  RowSet result;
  for (const RowRange& range : ranges_) {
    int64_t begin = range.begin;
    for (const RowRange& hole : other.ranges_) {
      if (!Overlap(hole, range)) continue;
      result.Add({begin, hole.begin});
      begin = hole.end;
    }
    result.Add({begin, range.end});
  }
  return result;
}

RowRange RowSet::hull() const {
  ANNULUS_CHECK(!empty());
  return {ranges_.front().begin, ranges_.back().end};
}

}  // namespace annulus
