#pragma once

// What every op and layer gets first: the device, the stream on which work is enqueued, where memory for
// saved and temporary tensors comes from, and what to call while computing so that transfers make progress.
// No globals.
//
// On a GPU ops enqueue on `stream()` and return; what they read and write is ordered by that stream. Memory
// of an arena may be released as soon as the work on it is enqueued: its next user comes later on the same
// stream.

#include <functional>
#include <memory>
#include <vector>

#include "annulus/device/buffer.h"
#include "annulus/device/flight_recorder.h"
#include "annulus/device/gpu.h"
#include "annulus/device/stream.h"
#include "annulus/device/wait_clock.h"

namespace annulus {

// Library handles, workspaces and plans that the ops keep for a context; made by them at first use.
struct OpState {
  virtual ~OpState() = default;
};

// Pinned memory for copies to the device, each piece reused once the device has read it. Never waits for the
// device: it grows until it holds all that the host has sent ahead.
class StagingMemory {
 public:
  explicit StagingMemory(Device device) : device_(device) {}
  // `fill_and_enqueue` writes at most `bytes` of pinned memory and enqueues on `stream` what reads it. It
  // does not call Send.
  void Send(int64_t bytes, StreamHandle stream, const std::function<void(void* pinned)>& fill_and_enqueue);
  int64_t capacity_bytes() const;

 private:
  struct Piece {
    PinnedBuffer memory;
    Event sent;
  };
  Piece& FreePiece(int64_t bytes);

  Device device_;
  std::vector<Piece> pieces_;
};

// kRequired: the same bits on every run of the same layout; slower kernels where the fast ones add in any
// order.
enum class Determinism { kOff, kRequired };

// What serves attention in bf16 on GPUs (annulus/ops/attention.h): of the kernels that can, the fastest; or
// one that is asked for, and what it cannot serve is refused.
enum class AttentionChoice { kFastest, kHopper, kCudnn, kTensorCore };

struct Context {
  explicit Context(Device d, Determinism required = Determinism::kOff)
      : device(d),
        hopper(RunsHopperKernels(d)),
        determinism(required),
        lane(d),
        saved(d),
        scratch(d),
        staging(d),
        waits(d),
        recorder(d) {}

  Device device;
  bool hopper;  // RunsHopperKernels of the device
  Determinism determinism;
  AttentionChoice attention = AttentionChoice::kFastest;
  Stream lane;
  Arena saved;    // tensors kept from forward to backward; released by the trainer after each micro-step
  Arena scratch;  // temporaries, stack discipline through ArenaScope
  StagingMemory staging;
  WaitClock waits;
  FlightRecorder recorder;
  std::unique_ptr<OpState> ops;
  // Called between tiles of long CPU kernels; MPI moves large messages only when polled.
  std::function<void()> progress;

  StreamHandle stream() const { return lane.handle(); }
  void Poll() const {
    if (progress) progress();
  }
};

// Calls fn.template operator()<T>(device tag) for the device of the context and the C++ type of a compute
// dtype: f32 and f64 on CPUs, f32 and bf16 on GPUs. One place to add either.
struct CpuTag {};
struct CudaTag {};
template <typename Fn>
decltype(auto) VisitKernel(const Context& ctx, DType dtype, Fn&& fn) {
#if ANNULUS_HAS_CUDA
  if (ctx.device.kind == DeviceKind::kCuda) {
    ANNULUS_CHECK(dtype == DType::kF32 || dtype == DType::kBF16)
        << Name(dtype) << " on " << ToString(ctx.device);
    if (dtype == DType::kBF16) return fn.template operator()<BFloat16>(CudaTag{});
    return fn.template operator()<float>(CudaTag{});
  }
#endif
  ANNULUS_CHECK(ctx.device.kind == DeviceKind::kCpu) << "no kernels for " << ToString(ctx.device);
  ANNULUS_CHECK(dtype == DType::kF32 || dtype == DType::kF64)
      << Name(dtype) << " on " << ToString(ctx.device);
  if (dtype == DType::kF64) return fn.template operator()<double>(CpuTag{});
  return fn.template operator()<float>(CpuTag{});
}

// The same for what does not depend on a dtype: fn(device tag).
template <typename Fn>
decltype(auto) VisitDevice(const Context& ctx, Fn&& fn) {
#if ANNULUS_HAS_CUDA
  if (ctx.device.kind == DeviceKind::kCuda) return fn(CudaTag{});
#endif
  ANNULUS_CHECK(ctx.device.kind == DeviceKind::kCpu) << "no kernels for " << ToString(ctx.device);
  return fn(CpuTag{});
}

}  // namespace annulus
