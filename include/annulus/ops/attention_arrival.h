#pragma once

// Attention of a block of queries on keys of which some are on their way: one launch that begins with the
// parts that are there and takes the others as they come, in any order. What brings them must need no
// multiprocessor of this GPU, which the launch may hold all of: copies between GPUs, not kernels.

#include "absl/types/span.h"
#include "annulus/base/row_range.h"
#include "annulus/device/wait_report.h"
#include "annulus/ops/attention.h"

namespace annulus {

// Rows of a block's keys that come together.
struct KeyPart {
  RowRange rows;
  KeyPositions positions;  // of the first of these rows, and from row to row
  // In device memory: the part is there once *arrived - awaited is not negative as a 32-bit integer. Null: it
  // is there before the launch.
  const uint32_t* arrived = nullptr;
  uint32_t awaited = 0;
};
inline constexpr size_t kMaxKeyParts = 64;

struct ArrivingAttention {
  // k and v: memory of all parts; what lies outside of them may change while the launch runs. By its mask
  // shape and key_positions nothing is known.
  AttentionBlock block;
  absl::Span<const KeyPart> parts = {};  // apart; at most kMaxKeyParts
  // A wait for longer ends the launch with an error, for good, behind a report.
  int64_t patience_ms = 600'000;
  WaitReport* report = nullptr;  // its parts are these
};

// Whether there is such a kernel for blocks of this case: on Hopper, where sums may be in any order.
bool TakesArrivals(const AttentionKernelCase& c);

// The parts hold all keys of the queries: out is overwritten, in the compute dtype.
//   out: [q_rows, batch, heads, v_dim]   lse: [q_rows, batch, heads]
absl::Status AttentionForwardArriving(Context& ctx, const ArrivingAttention& attention, HeadsRef out,
                                      TensorRef lse);

}  // namespace annulus
