#pragma once

// A group whose messages hold their links for a time (LinkThrottle), on CPUs. Each ordered pair of ranks has
// a link of its own:
//
//     receiver   [request]--->                                                [complete]
//     sender              [link free at `end`; end += bytes / rate]--end--->  [complete]
//                         [data]------------------------------------------>
//
// A message gets its link once both of its ends are there, in order of their requests, and is complete at
// both ends at `end`. What data takes by itself goes on meanwhile.

#include "annulus/comm/communicator.h"

namespace annulus {

// The group of `inner`. Messages that are under way from one rank to another at one time have different tags.
// Times are read from the monotonic clock, so all ranks must be on one host. Groups split from it are
// throttled alike; collectives are not. Collective.
absl::StatusOr<Communicator> WithLinkRate(Communicator inner, double bytes_per_second);

}  // namespace annulus
