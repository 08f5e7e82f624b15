#pragma once

// Copies between host and device in the order of a stream. On CPUs they are plain copies.

#include "absl/types/span.h"
#include "annulus/device/context.h"

namespace annulus {

// to = from, equal bytes, either of them on any device, in the order of `stream` (null only between CPUs).
// Host memory is pinned, or the host waits.
void CopyBytes(ConstTensorRef from, TensorRef to, StreamHandle stream);
void ZeroBytes(TensorRef x, StreamHandle stream);

// to = host values, `bytes` in all, ordered on the context's stream; `host` may be changed as soon as this
// returns. Goes through pinned memory that the context keeps, so the host does not wait for the device.
void Upload(Context& ctx, const void* host, int64_t bytes, TensorRef to);

template <typename T>
TensorRef Upload(Context& ctx, Arena& arena, absl::Span<const T> host) {
  const TensorRef to = arena.Allocate(DTypeOf<T>(), {static_cast<int64_t>(host.size())});
  Upload(ctx, host.data(), to.bytes(), to);
  return to;
}

// Waits for the context's stream and copies.   host: from.bytes()
void Download(Context& ctx, ConstTensorRef from, void* host);

// f64 numbers that the host reads some time after the device has written them.
class Readback {
 public:
  Readback(Device device, int64_t count);
  void Start(Context& ctx, ConstTensorRef values);  // f64 [count]; enqueues the copy
  absl::Span<const double> Wait();                  // the host waits for the last copy started

 private:
  PinnedBuffer memory_;
  int64_t count_;
  Event done_;
};

}  // namespace annulus
