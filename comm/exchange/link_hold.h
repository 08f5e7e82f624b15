#pragma once

// LinkThrottle on a GPU. Behind a message its stream waits until the link has been held for as long as the
// bytes take at the artificial rate:
//
//     stream  [take: until = max(now, link free) + bytes / rate; link free = until][message][hold: now >=
//     until]
//
// Both are kernels of one thread; beside computing that leaves no registers of a multiprocessor free, a hold
// takes the turn of one CTA. Messages of several streams may queue up for one link, which serves them in the
// order in which they get to it. A hold ends by itself: the GPU's clock goes on.

#include "annulus/comm/exchange_transport.h"

namespace annulus {

class LinkHold {
 public:
  // throttle.bytes_per_second > 0. Lanes are streams that take and hold.
  LinkHold(Device device, LinkThrottle throttle, int links, size_t lanes);

  // `bytes` are about to go over the link.
  absl::Status Take(StreamHandle stream, size_t lane, int link, int64_t bytes);
  // The lane's stream goes on when the links that it took have been held.
  absl::Status Hold(StreamHandle stream, size_t lane) const;

 private:
  uint64_t* Until(size_t lane) const { return static_cast<uint64_t*>(memory_.data()) + links_ + lane; }

  const double bytes_per_second_;
  const size_t links_;
  Buffer memory_;  // nanoseconds of the GPU's clock: when each link is free, and until when each lane holds
};

}  // namespace annulus
