#pragma once

// What everything that calls NCCL shares. Included by *_cuda.cc only.

#include <nccl.h>

#include "annulus/comm/communicator.h"

namespace annulus {

// OK, or Internal with where, the call, the device and the library's message. comm may be null.
absl::Status NcclStatus(ncclResult_t code, const char* where, const char* call, Device device,
                        ncclComm_t comm);

#define ANNULUS_NCCL_TEXT(x) #x
#define ANNULUS_NCCL_LINE(line) ANNULUS_NCCL_TEXT(line)
#define ANNULUS_NCCL(call, device, comm) \
  NcclStatus((call), __FILE_NAME__ ":" ANNULUS_NCCL_LINE(__LINE__), #call, (device), (comm))

// A communicator of the same group as `host`, on the calling thread's device, whose kernels take at most
// `max_ctas` CTAs. Collective; fails on all ranks or on none.
absl::StatusOr<ncclComm_t> ConnectNccl(Communicator host, Device device, int max_ctas);

}  // namespace annulus
