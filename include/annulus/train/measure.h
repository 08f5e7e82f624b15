#pragma once

// What measurements of parts share: operands, and times that all ranks agree on.

#include <functional>
#include <limits>

#include "annulus/comm/communicator.h"
#include "annulus/device/context.h"

namespace annulus {

// A tensor of normal random values; memory of `arena`.
absl::StatusOr<TensorRef> RandomTensor(Context& ctx, Arena& arena, DType dtype, const Shape& shape,
                                       uint64_t seed);

// Of ranks that need not wait for each other, what disturbs one now and then is not what all of them take.
enum class Slowest { kOfEachRepeat, kByMedian };
struct Repeats {
  int64_t warm_ups = 2;
  int64_t timed = 10;
  double seconds = std::numeric_limits<double>::infinity();  // no third repeat after as long
  int64_t calls = 1;                                         // of each timed repeat, one behind the other
  Slowest slowest = Slowest::kOfEachRepeat;
};

// Median over repeats of the slowest rank's seconds of one call, or of the ranks' medians the slowest. All
// ranks begin each repeat together and fail together. Collective.
absl::StatusOr<double> SecondsOf(Context& ctx, Communicator world, const Repeats& repeats,
                                 const std::function<absl::Status()>& call);

}  // namespace annulus
