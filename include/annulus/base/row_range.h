#pragma once

#include <cstdint>

namespace annulus {

// Rows [begin, end).
struct RowRange {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
  bool empty() const { return begin >= end; }
  friend bool operator==(const RowRange&, const RowRange&) = default;
};

}  // namespace annulus
