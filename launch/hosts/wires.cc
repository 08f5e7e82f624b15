#include "wires.h"

#include <algorithm>

namespace annulus::hosts {

Wires::Wires(int hosts, const LinkShape& shape)
    : shape_(shape), losses_(shape.seed, "lost frames"), ends_(static_cast<size_t>(hosts)) {}

int64_t Wires::WireTime(int64_t bytes) const {
  if (shape_.bits_per_second == 0) return 0;
  return static_cast<int64_t>(static_cast<double>(bytes * 8) / shape_.bits_per_second *
                              kNanosecondsPerSecond);
}

std::optional<int64_t> Wires::Send(int from, int to, int64_t bytes, int64_t now) {
  End& sender = ends_[static_cast<size_t>(from)];
  End& receiver = ends_[static_cast<size_t>(to)];
  const int64_t time = WireTime(bytes + kWireOverheadBytes);
  sender.up_free = std::max(sender.up_free, now) + time;
  const bool lost = shape_.loss > 0 && losses_.Uniform(frames_++) < shape_.loss;
  if (lost || sender.cut || receiver.cut) return std::nullopt;
  const int64_t arrived = std::max(sender.up_free, receiver.down_free + time);
  if (arrived - sender.up_free > WireTime(kSwitchBufferBytes)) return std::nullopt;
  receiver.down_free = arrived;
  return arrived + shape_.delay_ns;
}

}  // namespace annulus::hosts
