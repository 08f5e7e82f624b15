#include "../../src/device/cuda_call.h"
#include "link_hold.h"
#include "link_hold_kernels.h"

namespace annulus {

LinkHold::LinkHold(Device device, LinkThrottle throttle, int links, size_t lanes)
    : bytes_per_second_(throttle.bytes_per_second),
      links_(static_cast<size_t>(links)),
      memory_(device, static_cast<int64_t>((links_ + lanes) * sizeof(uint64_t))) {}

absl::Status LinkHold::Take(StreamHandle stream, size_t lane, int link, int64_t bytes) {
  const double seconds = static_cast<double>(bytes) / bytes_per_second_;
  uint64_t* const link_free = static_cast<uint64_t*>(memory_.data()) + link;
  return CudaStatus("TakeLink",
                    LaunchTakeLink(link_free, static_cast<uint64_t>(seconds * 1e9), Until(lane), stream));
}

absl::Status LinkHold::Hold(StreamHandle stream, size_t lane) const {
  return CudaStatus("HoldLink", LaunchHoldLink(Until(lane), stream));
}

}  // namespace annulus
