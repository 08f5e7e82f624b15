#pragma once

// Measures a machine for the cost model of exchange plans: rates of the block kernels by pass, mask shape and
// size, of copies, of links by transport and size; latencies. All ranks measure at the same time, as they
// compute at the same time, and the slowest counts.

#include <functional>
#include <string>
#include <vector>

#include "annulus/base/host.h"
#include "annulus/parallel/machine_profile.h"
#include "annulus/train/placement.h"

namespace annulus {

struct CalibrationHeads {
  DType dtype = DType::kF32;
  int64_t heads = 0, kv_heads = 0, head_dim = 0, v_head_dim = 0;
};

struct CalibrationOptions {
  std::vector<CalibrationHeads> heads;  // empty: heads of 64 and 128, on CPUs smaller ones as well
  std::string host = HostName();  // of this rank: links inside hosts and between them are told apart by it
  double seconds = 40;  // no further size of a kernel is measured after as long; each has one at least
  std::function<void(const std::string&)> progress = [](const std::string&) {};  // a line now and then
};

// Links are measured where the group has two ranks or more, where it is on several hosts those between them
// as well. Collective; equal on every rank.
absl::StatusOr<MachineProfile> Calibrate(Machine& machine, const CalibrationOptions& options);

// The profile as a table for people.
std::string ProfileTable(const MachineProfile& profile);

}  // namespace annulus
