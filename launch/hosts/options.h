#pragma once

// The command line of namespace_hosts.

#include <string>
#include <vector>

#include "annulus/base/status.h"
#include "wires.h"

namespace annulus::hosts {

struct Options {
  int hosts = 0;
  int slots = 1;  // ranks that mpirun places on each host
  LinkShape link;
  std::string control;  // a fifo to cut and mend links by; empty: none
  double grace_seconds = 10;
  std::vector<std::string> command;
};

// An error has the usage in it.
absl::StatusOr<Options> ParseOptions(const std::vector<std::string>& args);

// "100mbit", "2.5gbit": bits per second.
absl::StatusOr<double> ParseRate(const std::string& text);
// "50us", "2ms", "1.5s": seconds.
absl::StatusOr<double> ParseTime(const std::string& text);
// "0.1%": 0.001.
absl::StatusOr<double> ParseShare(const std::string& text);

}  // namespace annulus::hosts
