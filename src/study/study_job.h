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

// What a program said went wrong in its log, else the log's last lines; with the log's name.
std::string ReasonIn(const std::string& log);
// "took longer than measure.limit_minutes, 30m: " and the reason.
std::string TookTooLong(double limit_seconds, const std::string& log);

}  // namespace annulus
