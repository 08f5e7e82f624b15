#pragma once

// "Did you mean": the nearest of some names.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace annulus::config {

// The candidate nearest to `word` by edit distance without regard to case (a swap of neighbours counts 1),
// if it is near enough to be meant: a third of the word's length, at least 1 edit.
std::optional<std::string> Nearest(absl::string_view word, const std::vector<std::string>& candidates);

}  // namespace annulus::config
