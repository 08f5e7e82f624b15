#pragma once

// A set of rows of one block as sorted, disjoint ranges that do not touch.

#include <vector>

#include "annulus/comm/exchange_plan.h"

namespace annulus {

class RowSet {
 public:
  void Add(const RowRange& rows);
  void Add(const RowSet& other);
  RowSet Intersect(const RowSet& other) const;
  RowSet Subtract(const RowSet& other) const;

  const std::vector<RowRange>& ranges() const { return ranges_; }
  bool empty() const { return ranges_.empty(); }
  RowRange hull() const;  // of a set that is not empty

 private:
  std::vector<RowRange> ranges_;
};

inline bool Overlap(const RowRange& a, const RowRange& b) { return a.begin < b.end && b.begin < a.end; }
inline bool Contains(const RowRange& outer, const RowRange& inner) {
  return outer.begin <= inner.begin && inner.end <= outer.end;
}

}  // namespace annulus
