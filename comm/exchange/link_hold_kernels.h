#pragma once

// Kernels of link_hold.h. Times are nanoseconds of the GPU's clock.

#include <cuda_runtime_api.h>

#include <cstdint>

namespace annulus {

// *link_free = max(*link_free, now) + duration_ns; *until, which is no later, becomes that.
cudaError_t LaunchTakeLink(uint64_t* link_free, uint64_t duration_ns, uint64_t* until, cudaStream_t stream);
// Ends at *until.
cudaError_t LaunchHoldLink(const uint64_t* until, cudaStream_t stream);

}  // namespace annulus
