#pragma once

// What every op and layer gets first: the device, where memory for saved and temporary tensors comes
// from, and what to call while computing so that transfers make progress. No globals.

#include <functional>

#include "annulus/device/buffer.h"

namespace annulus {

struct Context {
  explicit Context(Device d) : device(d), saved(d), scratch(d) {}

  Device device;
  Arena saved;    // tensors kept from forward to backward; released by the trainer after each micro-step
  Arena scratch;  // temporaries, stack discipline through ArenaScope
  // Called between tiles of long CPU kernels; MPI moves large messages only when polled.
  std::function<void()> progress;

  void Poll() const {
    if (progress) progress();
  }
};

// Calls fn(device tag) for the device that the context is on. One place to add a device.
struct CpuTag {};
template <typename Fn>
decltype(auto) VisitDevice(const Context& ctx, Fn&& fn) {
  ANNULUS_CHECK(ctx.device.kind == DeviceKind::kCpu) << "no kernels for " << ToString(ctx.device);
  return fn(CpuTag{});
}

}  // namespace annulus
