#include "annulus/comm/gpu_communicator.h"

namespace annulus {

absl::StatusOr<Communicator> WithGpu(Communicator, GpuLink link, Context&, std::string) {
  return absl::UnimplementedError(
      absl::StrCat("GPU communicator by ", Name(link), ": this build has no CUDA"));
}

std::string NcclVersion() { return "none"; }

}  // namespace annulus
