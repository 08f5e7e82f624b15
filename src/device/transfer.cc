#include "annulus/device/transfer.h"

#include <algorithm>
#include <cstring>

#include "gpu_memory.h"

namespace annulus {
namespace {

constexpr int64_t kUploadPieceBytes = int64_t{32} << 20;

}  // namespace

void CopyBytes(ConstTensorRef from, TensorRef to, StreamHandle stream) {
  ANNULUS_CHECK(from.bytes() == to.bytes()) << from.bytes() << " bytes to " << to.bytes();
  if (from.bytes() == 0) return;
  if (from.device().kind == DeviceKind::kCpu && to.device().kind == DeviceKind::kCpu)
    std::memcpy(to.raw(), from.raw(), static_cast<size_t>(from.bytes()));
  else
    EnqueueCopy(from.raw(), to.raw(), from.bytes(), stream);
}

void ZeroBytes(TensorRef x, StreamHandle stream) {
  if (x.bytes() == 0) return;
  if (x.device().kind == DeviceKind::kCpu)
    std::memset(x.raw(), 0, static_cast<size_t>(x.bytes()));
  else
    EnqueueZero(x.raw(), x.bytes(), stream);
}

void Upload(Context& ctx, const void* host, int64_t bytes, TensorRef to) {
  ANNULUS_CHECK(bytes == to.bytes()) << bytes << " bytes to " << to.bytes();
  ANNULUS_CHECK(to.device() == ctx.device)
      << ToString(to.device()) << " from a context on " << ToString(ctx.device);
  if (bytes == 0) return;
  if (ctx.device.kind == DeviceKind::kCpu) {
    std::memcpy(to.raw(), host, static_cast<size_t>(bytes));
    return;
  }
  // In pieces, so that little memory is pinned however large the tensor is.
  for (int64_t begin = 0; begin < bytes; begin += kUploadPieceBytes) {
    const int64_t piece = std::min(kUploadPieceBytes, bytes - begin);
    ctx.staging.Send(piece, ctx.stream(), [&](void* pinned) {
      std::memcpy(pinned, static_cast<const char*>(host) + begin, static_cast<size_t>(piece));
      EnqueueCopy(pinned, static_cast<char*>(to.raw()) + begin, piece, ctx.stream());
    });
  }
}

void Download(Context& ctx, ConstTensorRef from, void* host) {
  CopyBytes(from, TensorRef(host, from.dtype(), Device{}, from.shape()), ctx.stream());
  ctx.lane.Synchronize();
}

Readback::Readback(Device device, int64_t count)
    : memory_(device, count * SizeOf(DType::kF64)), count_(count), done_(device) {}

void Readback::Start(Context& ctx, ConstTensorRef values) {
  ANNULUS_CHECK(values.dtype() == DType::kF64 && values.elements() == count_)
      << Name(values.dtype()) << " " << ToString(values.shape()) << ": expected f64 [" << count_ << "]";
  CopyBytes(values, TensorRef(memory_.data(), DType::kF64, Device{}, {count_}), ctx.stream());
  done_.Record(ctx.stream());
}

absl::Span<const double> Readback::Wait() {
  done_.Synchronize();
  return {static_cast<const double*>(memory_.data()), static_cast<size_t>(count_)};
}

}  // namespace annulus
