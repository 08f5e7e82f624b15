#pragma once

#include <string>

#include "annulus/comm/communicator.h"
#include "annulus/device/context.h"

namespace annulus {

// GpuLink::kNccl of annulus/comm/gpu_communicator.h. The context's GPU is the calling thread's device.
absl::StatusOr<Communicator> MakeNcclComm(Communicator host, Context& ctx, std::string lane);

}  // namespace annulus
