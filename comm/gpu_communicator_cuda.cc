#include "annulus/comm/gpu_communicator.h"
#include "annulus/device/gpu.h"
#include "nccl_comm.h"
#include "staged_comm.h"

namespace annulus {

absl::StatusOr<Communicator> WithGpu(Communicator host, GpuLink link, Context& ctx, std::string lane) {
  absl::Status usable =
      ctx.device.kind == DeviceKind::kCuda
          ? UseGpu(ctx.device.index)
          : Invalid("device=", ToString(ctx.device), ": expected a GPU for tensors by ", Name(link));
  ANNULUS_RETURN_IF_ERROR(host.AgreeOk(usable));
  if (link == GpuLink::kHost) return MakeStagedComm(std::move(host), ctx, std::move(lane));
  return MakeNcclComm(std::move(host), ctx, std::move(lane));
}

}  // namespace annulus
