#include "annulus/device/transfer.h"

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

namespace annulus {
namespace {

std::vector<int32_t> Numbers(size_t count) {
  std::vector<int32_t> values(count);
  std::iota(values.begin(), values.end(), 1);
  return values;
}

template <typename T>
TensorRef RefOf(std::vector<T>& values) {
  return {values.data(), DTypeOf<T>(), Device{}, {static_cast<int64_t>(values.size())}};
}

TEST(Transfer, CopiesBytesAndNoMore) {
  std::vector<int32_t> from = Numbers(10), to(12, -1);
  CopyBytes(RefOf(from), RefOf(to).Rows(1, 11), nullptr);
  EXPECT_EQ(to, (std::vector<int32_t>{-1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, -1}));
  ZeroBytes(RefOf(to).Rows(2, 11), nullptr);
  EXPECT_EQ(to, (std::vector<int32_t>{-1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1}));
  CopyBytes(TensorRef(nullptr, DType::kF32, Device{}, {0}), TensorRef(nullptr, DType::kU8, Device{}, {0}),
            nullptr);
  ZeroBytes(TensorRef(nullptr, DType::kF32, Device{}, {0}), nullptr);
}

TEST(TransferDeathTest, SizesAgree) {
  std::vector<int32_t> from = Numbers(10), to(9);
  EXPECT_DEATH(CopyBytes(RefOf(from), RefOf(to), nullptr), "40 bytes to 36");
  Context ctx{Device{}};
  EXPECT_DEATH(Upload(ctx, from.data(), 40, RefOf(to)), "40 bytes to 36");
  const TensorRef elsewhere(to.data(), DType::kI32, Device{DeviceKind::kCuda, 1}, {9});
  EXPECT_DEATH(Upload(ctx, from.data(), 36, elsewhere), "cuda:1 from a context on cpu");
}

TEST(Transfer, UploadsAndDownloads) {
  Context ctx{Device{}};
  const std::vector<int32_t> sent = Numbers(1000);
  std::vector<int32_t> host = sent;
  const TensorRef there = Upload(ctx, ctx.scratch, absl::MakeConstSpan(host));
  EXPECT_EQ(there.dtype(), DType::kI32);
  EXPECT_EQ(there.shape(), Shape({1000}));
  host.assign(1000, 0);  // as the caller may
  Download(ctx, there, host.data());
  EXPECT_EQ(host, sent);
  EXPECT_EQ(Upload(ctx, ctx.scratch, absl::Span<const double>()).elements(), 0);
}

TEST(Readback, ReturnsTheValuesOfTheLastStart) {
  Context ctx{Device{}};
  Readback readback(Device{}, 3);
  std::vector<double> values = {1, 2, 3};
  readback.Start(ctx, RefOf(values));
  values = {4, 5, 6};
  EXPECT_EQ(readback.Wait(), absl::MakeConstSpan({1.0, 2.0, 3.0}));
  readback.Start(ctx, RefOf(values));
  EXPECT_EQ(readback.Wait(), absl::MakeConstSpan({4.0, 5.0, 6.0}));
}

TEST(ReadbackDeathTest, TakesWhatItIsFor) {
  Context ctx{Device{}};
  Readback readback(Device{}, 3);
  std::vector<double> two(2);
  std::vector<float> floats(3);
  EXPECT_DEATH(readback.Start(ctx, RefOf(two)), "f64 \\[2\\]: expected f64 \\[3\\]");
  EXPECT_DEATH(readback.Start(ctx, RefOf(floats)), "f32 \\[3\\]: expected f64 \\[3\\]");
}

}  // namespace
}  // namespace annulus
