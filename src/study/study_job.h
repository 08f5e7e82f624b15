#pragma once

// A job of `annulus train` as a child of this process: it has a time limit and never outlives this process,
// however that ends.

#include <string>
#include <vector>

#include "annulus/base/status.h"

namespace annulus {

struct ChildJob {
  std::vector<std::string> words;  // launch/mpirun and its arguments
  std::string log;                 // file for what it prints
  double limit_seconds = 0;
};

// Waits for its end. An error has the exit code, or the limit, and what the log says last.
absl::Status RunChildJob(const ChildJob& job);

}  // namespace annulus
