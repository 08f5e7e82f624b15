#include "annulus/comm/gpu_communicator.h"

#include "gpu_backend.h"

namespace annulus {

absl::string_view Name(GpuLink link) {
  switch (link) {
    case GpuLink::kNccl:
      return "nccl";
    case GpuLink::kHost:
      return "host memory";
  }
  return "";
}

absl::StatusOr<GpuLink> ChooseGpuLink(Communicator host, const Context& ctx) {
  ANNULUS_ASSIGN_OR_RETURN(const std::string shared, DescribeSharedGpu(host, ctx));
  return shared.empty() ? GpuLink::kNccl : GpuLink::kHost;
}

}  // namespace annulus
