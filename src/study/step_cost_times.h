#pragma once

// Seconds of operations by the rates of a machine.

#include "annulus/base/status.h"
#include "step_cost_ops.h"

namespace annulus {

class OpTimes {
 public:
  OpTimes(const MachineProfile& machine, DeviceKind device, DType dtype);

  // InvalidArgument where the machine has no rates of such operations.
  absl::Status Check(const Op& op) const;
  // Of one that computes, attention left out. A call takes its launch at least: while the device is at work
  // on one the host launches the next.
  double SecondsOf(const Op& op) const;
  double PassSeconds(PassKind kind, Pass pass, double bytes) const;

 private:
  const ScanRate* FindScan(const Op& op) const;
  double CallSeconds(const Op& op) const;

  const MachineProfile& machine_;
  ProductRates products_;
};

}  // namespace annulus
