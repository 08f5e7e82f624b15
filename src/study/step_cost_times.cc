#include "step_cost_times.h"

#include <algorithm>

#include "annulus/train/exchange.h"

namespace annulus {
namespace {

const char* Name(ScanKernel kernel) { return kernel == ScanKernel::kSsd ? "SSD" : "DELTA_RULE"; }

}  // namespace

OpTimes::OpTimes(const MachineProfile& machine, DeviceKind device, DType dtype)
    : machine_(machine), products_(ProductRatesOf(machine, device, dtype)) {}

const ScanRate* OpTimes::FindScan(const Op& op) const {
  const auto found = std::find_if(machine_.scans.begin(), machine_.scans.end(), [&](const ScanRate& rate) {
    return rate.kernel == op.scan && rate.pass == op.pass;
  });
  return found == machine_.scans.end() ? nullptr : &*found;
}

absl::Status OpTimes::Check(const Op& op) const {
  if (op.kind != OpKind::kScan || FindScan(op) != nullptr) return absl::OkStatus();
  return Invalid("machine profile of ", machine_.device, ": no scan { kernel: ", Name(op.scan),
                 " pass: ", op.pass == Pass::kForward ? "FORWARD" : "BACKWARD",
                 " }: expected a profile that annulus calibrate wrote, or one with assumed rates");
}

double OpTimes::PassSeconds(PassKind kind, Pass pass, double bytes) const {
  if (bytes <= 0) return 0;
  const auto found = std::find_if(machine_.passes.begin(), machine_.passes.end(), [&](const PassRate& rate) {
    return rate.kind == kind && rate.pass == pass;
  });
  const std::vector<RatePoint>& rates = found == machine_.passes.end() ? machine_.copy : found->bytes;
  return std::max(machine_.launch_seconds, bytes / RateAt(rates, bytes));
}

double OpTimes::CallSeconds(const Op& op) const {
  switch (op.kind) {
    case OpKind::kProduct:
      return op.size / RateAt(products_.forward, op.size);
    case OpKind::kGradient:  // rates are those of both gradients together
      return op.size / RateAt(products_.gradients, 2 * op.size);
    case OpKind::kScan:
      return op.size / RateAt(FindScan(op)->updates, op.size);
    case OpKind::kPass:
      return PassSeconds(op.pass_kind, op.pass, op.size);
    case OpKind::kAttention:
    case OpKind::kStates:
    case OpKind::kTensorGather:
    case OpKind::kTensorScatter:
      break;
  }
  return 0;
}

double OpTimes::SecondsOf(const Op& op) const {
  return op.size > 0 ? op.times * std::max(machine_.launch_seconds, CallSeconds(op)) : 0;
}

}  // namespace annulus
