#pragma once

// How fast a transport moves blocks between neighbours of a ring.

#include "annulus/comm/exchange_transport.h"

namespace annulus {

// Of what one GPU sends, all GPUs sending at once. 1 GB = 1e9 bytes.
struct ExchangeRate {
  double one_way_gb_per_second = 0;    // all of it to the next rank
  double both_ways_gb_per_second = 0;  // half of it to the next rank, half to the one before
};

// Each rank sends messages of `bytes` one after the other into two buffers of its neighbour in turn. The
// slowest rank's median of `repeats` executions, on GPUs in device time, the cost of flags and events
// included. InvalidArgument for less than two ranks. Collective.
absl::StatusOr<ExchangeRate> MeasureExchange(Context& ctx, Communicator cp, ExchangeTransport& transport,
                                             int64_t bytes, int repeats = 15);

}  // namespace annulus
