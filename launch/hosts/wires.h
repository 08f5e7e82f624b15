#pragma once

// What shaped links do to frames, in virtual time: every host has a full-duplex link to one switch.
//
//   host --- up: one frame after the other at the rate ---> switch --- down: the same ---> host
//
// The switch begins to hand a frame on with its first byte (cut-through), so that an idle path takes the time
// of one link, not of two. A receiver that several hosts send to gets their frames one after the other; what
// would wait for more than the switch's buffer is dropped. The delay comes on top, one way from host to host.
// No clocks and no system calls: times are nanoseconds that the caller counts.

#include <cstdint>
#include <optional>
#include <vector>

#include "annulus/base/random.h"

namespace annulus::hosts {

inline constexpr int64_t kNanosecondsPerSecond = 1'000'000'000;
// Of Ethernet, beside each frame on the wire: preamble 8, check sequence 4, gap 12.
inline constexpr int64_t kWireOverheadBytes = 24;
inline constexpr int64_t kSwitchBufferBytes = int64_t{4}
                                              << 20;  // before each receiver, as of deep-buffered switches

struct LinkShape {
  double bits_per_second = 0;  // each way; 0: frames take no time
  int64_t delay_ns = 0;        // one way, from host to host
  double loss = 0;             // share of frames
  uint64_t seed = 1;           // of the frames that are lost
};

class Wires {
 public:
  Wires(int hosts, const LinkShape& shape);

  // A frame of `bytes` that `from` hands to its link at `now`: when its last byte is at `to`, or nothing if
  // it never arrives.
  std::optional<int64_t> Send(int from, int to, int64_t bytes, int64_t now);
  // When all that the host has handed to its link will have left it.
  int64_t FreeAt(int host) const { return ends_[static_cast<size_t>(host)].up_free; }
  // Nothing gets from or to a host that is cut off.
  void Cut(int host) { ends_[static_cast<size_t>(host)].cut = true; }
  void Mend(int host) { ends_[static_cast<size_t>(host)].cut = false; }

 private:
  struct End {
    int64_t up_free = 0, down_free = 0;
    bool cut = false;
  };
  int64_t WireTime(int64_t bytes) const;

  const LinkShape shape_;
  const RandomStream losses_;
  std::vector<End> ends_;
  uint64_t frames_ = 0;
};

}  // namespace annulus::hosts
