#pragma once

// What the measurements of exchange_bench.h share.

#include <functional>

#include "annulus/comm/communicator.h"
#include "annulus/device/context.h"

namespace annulus {

// Of one timed run, so that its beginning and end weigh little, and the receiver's buffers, which they take
// in turn: two are written while two are handed back.
constexpr int kTimedMessages = 64, kTimedBuffers = 4;

// InvalidArgument for what has no rate.
absl::Status CheckRate(const Communicator& cp, int64_t bytes, int repeats);

// The slowest rank's median over `repeats` runs of `fn`, which all ranks begin together. Collective.
absl::StatusOr<double> MedianSeconds(Context& ctx, Communicator& cp, int repeats,
                                     const std::function<absl::Status()>& fn);

}  // namespace annulus
