#include "switch.h"

#include <poll.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>

namespace annulus::hosts {
namespace {

// What a host may hand to its link ahead of time, as to the queue of a network card: the link stays busy
// though this process may wake up late. What more there is waits in the host's kernel, which slows its
// senders down.
constexpr int64_t kAheadNs = kNanosecondsPerSecond / 1000;
constexpr int kFramesInTurn = 32;  // of one host, before the others have theirs
constexpr size_t kMacBytes = 6;
constexpr size_t kMostFrameBytes = kMtu + 18;  // Ethernet's header, and one of a VLAN

}  // namespace

int64_t MonotonicNanoseconds() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * kNanosecondsPerSecond + now.tv_nsec;
}

Switch::Switch(std::vector<int> taps, const LinkShape& shape)
    : wires_(static_cast<int>(taps.size()), shape), ports_(taps.size()) {
  for (size_t host = 0; host < taps.size(); ++host) ports_[host].tap = taps[host];
}

bool Switch::TakesMore(int host, int64_t now) const { return wires_.FreeAt(host) <= now + kAheadNs; }

void Switch::Turn() {
  for (size_t host = 0; host < ports_.size(); ++host) {
    const int64_t now = MonotonicNanoseconds();
    for (Port& port : ports_) Deliver(port, now);
    Take(static_cast<int>(host), now);
  }
}

void Switch::Take(int from, int64_t now) {
  for (int count = 0; count < kFramesInTurn && TakesMore(from, now); ++count) {
    std::vector<char> frame(kMostFrameBytes);
    const ssize_t bytes = read(ports_[static_cast<size_t>(from)].tap, frame.data(), frame.size());
    if (bytes < static_cast<ssize_t>(2 * kMacBytes)) return;
    frame.resize(static_cast<size_t>(bytes));
    Forward(from, std::move(frame), now);
  }
}

void Switch::Forward(int from, std::vector<char> frame, int64_t now) {
  const auto bytes = static_cast<int64_t>(frame.size());
  const bool to_all = (frame[0] & 1) != 0;
  const int last = static_cast<unsigned char>(frame[kMacBytes - 1]);
  for (int to = 0; to < static_cast<int>(ports_.size()); ++to) {
    if (to == from || (!to_all && to != last)) continue;
    const std::optional<int64_t> due = wires_.Send(from, to, bytes, now);
    if (due.has_value()) ports_[static_cast<size_t>(to)].arriving.push_back({*due, frame});
  }
}

void Switch::Deliver(Port& port, int64_t now) {
  while (!port.arriving.empty() && port.arriving.front().due <= now) {
    const std::vector<char>& bytes = port.arriving.front().bytes;
    // A frame that the host does not take is lost, as others are.
    [[maybe_unused]] const ssize_t written = write(port.tap, bytes.data(), bytes.size());
    port.arriving.pop_front();
  }
}

void Switch::Wait(const std::vector<int>& others) {
  const int64_t now = MonotonicNanoseconds();
  int64_t wake = now + kNanosecondsPerSecond;
  std::vector<pollfd> polled;
  for (size_t host = 0; host < ports_.size(); ++host) {
    const Port& port = ports_[host];
    if (!port.arriving.empty()) wake = std::min(wake, port.arriving.front().due);
    if (TakesMore(static_cast<int>(host), now))
      polled.push_back({port.tap, POLLIN, 0});
    else
      wake = std::min(wake, wires_.FreeAt(static_cast<int>(host)) - kAheadNs);
  }
  for (const int fd : others) polled.push_back({fd, POLLIN, 0});
  const int64_t wait = std::max<int64_t>(wake - now, 0);
  const timespec timeout{wait / kNanosecondsPerSecond, wait % kNanosecondsPerSecond};
  ppoll(polled.data(), polled.size(), &timeout, nullptr);
}

}  // namespace annulus::hosts
