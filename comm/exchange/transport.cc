#include <array>
#include <cmath>

#include "annulus/base/hash.h"
#include "annulus/comm/exchange_transport.h"
#include "gpu_transport.h"
#include "host_transport.h"
#include "throttled_comm.h"

namespace annulus {

absl::string_view Name(TransportKind kind) {
  switch (kind) {
    case TransportKind::kHost:
      return "host";
    case TransportKind::kNccl:
      return "nccl";
    case TransportKind::kCopyEngine:
      return "copy engine";
  }
  return "";
}

std::string Label(LinkThrottle throttle) {
  if (throttle.bytes_per_second == 0) return "";
  return absl::StrCat("LINKS THROTTLED to ", throttle.bytes_per_second / 1e9, " GB/s");
}

absl::StatusOr<TransportKind> ChooseTransport(Communicator cp, const Context& ctx) {
  if (ctx.device.kind == DeviceKind::kCpu) return TransportKind::kHost;
  return ChooseGpuTransport(std::move(cp), ctx);
}

absl::StatusOr<std::unique_ptr<ExchangeTransport>> MakeTransport(TransportKind kind, Communicator cp,
                                                                 Context& ctx, LinkThrottle throttle) {
  const double rate = throttle.bytes_per_second;
  if (!std::isfinite(rate) || rate < 0) {
    return Invalid("throttle.bytes_per_second=", rate, ": expected a rate, or 0 for none");
  }
  const bool gpu = ctx.device.kind == DeviceKind::kCuda;
  if (kind != TransportKind::kHost && !gpu) {
    return Invalid("exchange by ", Name(kind), ": expected a GPU, the context is on ", ToString(ctx.device));
  }
  if (kind == TransportKind::kHost && rate > 0) {
    ANNULUS_ASSIGN_OR_RETURN(cp, WithLinkRate(std::move(cp), rate));
  }
  if (gpu) return MakeGpuTransport(kind, std::move(cp), ctx, throttle);
  return MakeHostTransport(std::move(cp));
}

absl::Status AgreeOnPlan(const ExchangePlan& plan, Communicator& cp) {
  const uint64_t hash = HashOf(plan);
  // max(h) = ~min(~h): one reduction gives both ends.
  std::array<int64_t, 2> ends = {static_cast<int64_t>(hash), ~static_cast<int64_t>(hash)};
  ANNULUS_RETURN_IF_ERROR(
      cp.AllReduce(TensorRef(ends.data(), DType::kI64, Device{}, Shape{2}), ReduceOp::kMin));
  if (ends[0] == ~ends[1]) return absl::OkStatus();
  return Invalid("exchange plan ", plan.name, " hash=", Hex64(hash), " on cp rank ", cp.rank(),
                 ": expected the same plan on all ranks of the group");
}

}  // namespace annulus
