#include "../gpu_backend.h"
#include "annulus/comm/exchange_transport.h"
#include "annulus/comm/gpu_communicator.h"
#include "copy_engine.h"
#include "host_transport.h"
#include "nccl_transport.h"
#include "peer_memory.h"

namespace annulus {

absl::StatusOr<TransportKind> ChooseTransport(Communicator cp, const Context& ctx) {
  if (ctx.device.kind == DeviceKind::kCpu) return TransportKind::kHost;
  const absl::Status mapped = CheckPeerMemory(cp, ctx.device);
  if (mapped.ok()) return TransportKind::kCopyEngine;
  if (!absl::IsInvalidArgument(mapped)) return mapped;
  ANNULUS_ASSIGN_OR_RETURN(const std::string shared, DescribeSharedGpu(cp, ctx));
  return shared.empty() ? TransportKind::kNccl : TransportKind::kHost;
}

absl::StatusOr<std::unique_ptr<ExchangeTransport>> MakeTransport(TransportKind kind, Communicator cp,
                                                                 Context& ctx) {
  const bool gpu = ctx.device.kind == DeviceKind::kCuda;
  if (kind != TransportKind::kHost && !gpu) {
    return Invalid("exchange by ", Name(kind), ": expected a GPU, the context is on ", ToString(ctx.device));
  }
  switch (kind) {
    case TransportKind::kNccl:
      return MakeNcclTransport(std::move(cp), ctx);
    case TransportKind::kCopyEngine:
      return MakeCopyEngineTransport(std::move(cp), ctx);
    case TransportKind::kHost:
      break;
  }
  if (!gpu) return MakeHostTransport(std::move(cp));
  // A communicator of its own: that of the caller may go by NCCL, which knows no tags, and other messages.
  ANNULUS_ASSIGN_OR_RETURN(Communicator staged, WithGpu(std::move(cp), GpuLink::kHost, ctx, "exchange"));
  return MakeHostTransport(std::move(staged));
}

}  // namespace annulus
