#include "../gpu_backend.h"
#include "annulus/comm/gpu_communicator.h"
#include "copy_engine.h"
#include "gpu_transport.h"
#include "host_transport.h"
#include "nccl_transport.h"
#include "peer_memory.h"

namespace annulus {

absl::StatusOr<TransportKind> ChooseGpuTransport(Communicator cp, const Context& ctx) {
  const absl::Status mapped = CheckPeerMemory(cp, ctx.device);
  if (mapped.ok()) return TransportKind::kCopyEngine;
  if (!absl::IsInvalidArgument(mapped)) return mapped;
  ANNULUS_ASSIGN_OR_RETURN(const std::string shared, DescribeSharedGpu(cp, ctx));
  return shared.empty() ? TransportKind::kNccl : TransportKind::kHost;
}

absl::StatusOr<std::unique_ptr<ExchangeTransport>> MakeGpuTransport(TransportKind kind, Communicator cp,
                                                                    Context& ctx, LinkThrottle throttle) {
  if (kind == TransportKind::kNccl) return MakeNcclTransport(std::move(cp), ctx, throttle);
  if (kind == TransportKind::kCopyEngine) return MakeCopyEngineTransport(std::move(cp), ctx, throttle);
  // A communicator of its own: that of the caller may go by NCCL, which knows no tags, and other messages.
  ANNULUS_ASSIGN_OR_RETURN(Communicator staged, WithGpu(std::move(cp), GpuLink::kHost, ctx, "exchange"));
  return MakeHostTransport(std::move(staged));
}

}  // namespace annulus
