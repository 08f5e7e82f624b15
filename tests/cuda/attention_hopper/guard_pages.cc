#include <memory>

#include "cuda/attention_hopper/op_cases.h"
#include "cuda/attention_hopper/op_checks.h"
#include "src/device/gpu_memory.h"

namespace annulus::testing {
namespace {

constexpr Device kGpu{DeviceKind::kCuda, 0};

// Tensors that end where the memory of their range does.
class GuardedMemory {
 public:
  TensorRef Allocate(DType dtype, const Shape& shape) {
    const int64_t bytes = shape.elements() * SizeOf(dtype);
    ANNULUS_CHECK(bytes % 16 == 0) << ToString(shape) << " begins on 16 bytes";
    GpuRange& range = *ranges_.emplace_back(std::make_unique<GpuRange>(kGpu));
    range.Grow(bytes);
    return {range.data() + range.bytes() - bytes, dtype, kGpu, shape};
  }
  const char* BehindTheLast() const { return ranges_.back()->data() + ranges_.back()->bytes(); }

 private:
  std::vector<std::unique_ptr<GpuRange>> ranges_;
};

bool CheckCase(const OpCase& c) {
  Context ctx(kGpu, Determinism::kRequired);
  ctx.attention = AttentionChoice::kHopper;
  GuardedMemory guarded;
  const Allocate at_ends = [&](DType dtype, const Shape&shape) { return guarded.Allocate(dtype, shape); },
                 anywhere = [&](DType dtype, const Shape&shape) { return ctx.saved.Allocate(dtype, shape); };
  const OpOperands in(ctx, c, anywhere), guarded_in(ctx, c, at_ends);
  const DeviceArray<unsigned long long> different(std::vector<unsigned long long>(1));
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    OpResults want(c, dtype, anywhere), got(c, dtype, at_ends);
    const auto run = [&](OpResults& results, const OpOperands& operands) {
      dtype == DType::kBF16 ? results.RunWhole(ctx, operands) : results.RunCarried(ctx, operands);
    };
    run(want, in);
    run(got, guarded_in);
    for (size_t r = 0; r < kResults; ++r) {
      const TensorRef &x = want.of(static_cast<Result>(r)), &y = got.of(static_cast<Result>(r));
      CountDifferentBytes(x.raw(), y.raw(), x.bytes(), different.data, ctx.stream());
    }
  }
  unsigned long long bytes = 0;
  cudaError_t error = cudaStreamSynchronize(ctx.stream());
  if (error == cudaSuccess) error = cudaMemcpy(&bytes, different.data, sizeof bytes, cudaMemcpyDeviceToHost);
  const bool ok = error == cudaSuccess && bytes == 0;
  std::printf("%s guard pages, %s: %s, %llu bytes differ\n", ok ? "ok  " : "FAIL", c.text().c_str(),
              cudaGetErrorString(error), bytes);
  // After a fault nothing runs any more.
  if (error != cudaSuccess) std::_Exit(1);
  return ok;
}

[[noreturn]] void ExitByReadingBehind() {
  GuardedMemory guarded;
  guarded.Allocate(DType::kBF16, {8});
  const char* const end = guarded.BehindTheLast();
  Touch(end - 16, nullptr);
  const bool inside = cudaGetLastError() == cudaSuccess;
  Touch(end, nullptr);
  const bool behind = cudaGetLastError() == cudaSuccess;
  const bool ok = inside && !behind;
  std::printf("%s guard pages: a read of the last 16 bytes %s, of the next %s\n", ok ? "ok  " : "FAIL",
              inside ? "succeeds" : "fails", behind ? "succeeds" : "fails");
  std::fflush(stdout);
  // The fault is not this process's to recover from: owners of device memory would find it again.
  std::_Exit(ok ? 0 : 1);
}

}  // namespace

bool CheckGuardPages() {
  bool ok = true;
  for (const auto& [dim, v_dim] : {std::pair<int64_t, int64_t>{64, 64}, {128, 128}, {192, 128}}) {
    for (const OpMask mask : {OpMask::kFull, OpMask::kCausal, OpMask::kDocuments, OpMask::kRandom}) {
      for (const auto& [q_rows, k_rows] : {std::pair<int64_t, int64_t>{1, 1}, {127, 129}, {300, 517}}) {
        OpCase c{.dim = dim,
                 .v_dim = v_dim,
                 .q_rows = q_rows,
                 .k_rows = k_rows,
                 .batch = 2,
                 .heads = 4,
                 .kv_heads = 2,
                 .mask = mask,
                 .extent = 40,
                 .chunks = 1,
                 .seed = 1};
        if (mask == OpMask::kCausal) c.k_rows = c.q_rows;
        ok = CheckCase(c) && ok;
      }
    }
  }
  if (ok) ExitByReadingBehind();
  return false;
}

}  // namespace annulus::testing
