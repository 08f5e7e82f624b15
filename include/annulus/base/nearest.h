#pragma once

// The valid numbers nearest to one that is not, for messages.

#include <cstdint>
#include <string>

namespace annulus {

// " (nearest valid value 4 or 8)"; only `above` where both are the same or `below` is less than 1.
std::string NearestOf(int64_t below, int64_t above);
// For a value that should be a multiple of `unit`.
std::string NearestMultiple(int64_t value, int64_t unit);
// For a value that should divide `total`.
std::string NearestDivisor(int64_t value, int64_t total);

}  // namespace annulus
