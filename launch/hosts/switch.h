#pragma once

// The switch between the hosts: takes Ethernet frames from the TAP device of each, and gives them to the
// receiver's when the shaped links would have.

#include <cstdint>
#include <deque>
#include <vector>

#include "wires.h"

namespace annulus::hosts {

inline constexpr int kMtu = 9000;  // jumbo frames: the switch is a process, which costs time for each frame

int64_t MonotonicNanoseconds();

class Switch {
 public:
  // `taps`: one for each host, opened non-blocking; they belong to the caller. The MAC address of host i ends
  // in i.
  Switch(std::vector<int> taps, const LinkShape& shape);

  Wires& wires() { return wires_; }
  // Moves what there is to move.
  void Turn();
  // Waits for frames, for the time of the next delivery, or for something to read from `others`.
  void Wait(const std::vector<int>& others);

 private:
  struct Frame {
    int64_t due = 0;
    std::vector<char> bytes;
  };
  struct Port {
    int tap = -1;
    std::deque<Frame> arriving;  // in the order of their times
  };
  bool TakesMore(int host, int64_t now) const;
  void Take(int from, int64_t now);
  void Forward(int from, std::vector<char> frame, int64_t now);
  void Deliver(Port& port, int64_t now);

  Wires wires_;
  std::vector<Port> ports_;
};

}  // namespace annulus::hosts
