#pragma once

#include <string>

#include "annulus/comm/communicator.h"
#include "annulus/device/context.h"

namespace annulus {

// Of pinned memory that one operation takes at a time: long enough that the cost of a piece is its bytes.
inline constexpr int64_t kStagedPieceBytes = int64_t{64} << 20;

// GpuLink::kHost of annulus/comm/gpu_communicator.h. Calls nothing of CUDA itself, so it works on a context
// of any device. Collective.
absl::StatusOr<Communicator> MakeStagedComm(Communicator host, Context& ctx, std::string lane,
                                            int64_t piece_bytes = kStagedPieceBytes);

}  // namespace annulus
