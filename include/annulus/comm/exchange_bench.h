#pragma once

// How fast a transport moves blocks between neighbours of a ring.

#include "annulus/comm/exchange_transport.h"

namespace annulus {

// Of what one GPU sends, all GPUs sending at once. 1 GB = 1e9 bytes.
struct ExchangeRate {
  double one_way_gb_per_second = 0;    // all of it to the next rank
  double both_ways_gb_per_second = 0;  // half of it to the next rank, half to the one before
};

// The rate of a plan with nothing to compute: each rank sends 64 messages of `bytes` one after the other into
// four buffers of its neighbour in turn. A buffer is handed back as soon as its message has come, so two
// messages are under way while two buffers are on their way back: as in an exchange that has a buffer for
// each block in flight, what limits is the wire and the cost of a message, not the round trip of handing
// back. The slowest rank's median of `repeats` executions, on GPUs in device time, from the first to the last
// message with flags and events included. InvalidArgument for less than two ranks. Collective.
absl::StatusOr<ExchangeRate> MeasureExchange(Context& ctx, Communicator cp, ExchangeTransport& transport,
                                             int64_t bytes, int repeats = 15);

// What copy engines could reach, in GB/s one way: the same copies back to back on one stream of each rank,
// without flags, events or anybody who needs what they bring. InvalidArgument for less than two ranks and
// where ranks cannot map each other's memory. Collective.
absl::StatusOr<double> MeasurePlainCopies(Context& ctx, Communicator cp, int64_t bytes, int repeats = 15);

}  // namespace annulus
