#include "annulus/device/tensor.h"

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

namespace annulus {
namespace {

std::vector<float> Numbers(size_t count) {
  std::vector<float> values(count);
  std::iota(values.begin(), values.end(), 0.0f);
  return values;
}

TEST(Shape, ElementsAndEquality) {
  EXPECT_EQ(Shape().elements(), 1);
  EXPECT_EQ(Shape({2, 3, 4}).elements(), 24);
  EXPECT_EQ(Shape({2, 0, 4}).elements(), 0);
  EXPECT_EQ(Shape({2, 3}), Shape({2, 3}));
  EXPECT_FALSE(Shape({2, 3}) == Shape({2, 3, 1}));
  EXPECT_EQ(ToString(Shape({2, 3})), "[2, 3]");
  EXPECT_EQ(ToString(Shape()), "[]");
}

TEST(ShapeDeathTest, RefusesWhatItCannotHold) {
  EXPECT_DEATH(Shape({1, 1, 1, 1, 1}), "rank 5");
  EXPECT_DEATH(Shape({2, -1}), "dim 1 is -1");
  EXPECT_DEATH(Shape({int64_t{1} << 40, int64_t{1} << 40}).elements(), "1099511627776");
}

TEST(TensorRef, ViewIsRowMajor) {
  std::vector<float> values = Numbers(24);
  const TensorRef tensor(values.data(), DType::kF32, Device{}, Shape({2, 3, 4}));
  const View<float, 3> view = tensor.view<float, 3>();
  EXPECT_EQ(view.stride, (std::array<int64_t, 3>{12, 4, 1}));
  EXPECT_EQ(view(1, 2, 3), 23.0f);
  EXPECT_EQ(view(0, 1, 2), 6.0f);
  view(1, 0, 0) = -1;
  EXPECT_EQ(values[12], -1.0f);
  EXPECT_EQ(tensor.bytes(), 96);
}

TEST(TensorRef, RowsAndReshapedShareMemory) {
  std::vector<float> values = Numbers(24);
  const ConstTensorRef tensor = TensorRef(values.data(), DType::kF32, Device{}, Shape({4, 3, 2}));
  const ConstTensorRef middle = tensor.Rows(1, 3);
  EXPECT_EQ(middle.shape(), Shape({2, 3, 2}));
  EXPECT_EQ(middle.data<float>(), values.data() + 6);
  EXPECT_EQ((middle.view<float, 3>()(1, 2, 1)), 17.0f);
  EXPECT_EQ(tensor.Rows(4, 4).elements(), 0);
  EXPECT_EQ(tensor.Rows(0, 4).shape(), tensor.shape());
  const ConstTensorRef flat = middle.Reshaped(Shape({12}));
  EXPECT_EQ((flat.view<float, 1>()(11)), 17.0f);

  std::vector<double> wide(6);
  const TensorRef doubles(wide.data(), DType::kF64, Device{}, Shape({3, 2}));
  EXPECT_EQ(doubles.Rows(2, 3).data<double>(), wide.data() + 4);
}

TEST(TensorRef, ScalarAndUndefined) {
  float value = 5;
  const TensorRef scalar(&value, DType::kF32, Device{}, Shape());
  EXPECT_EQ(scalar.elements(), 1);
  EXPECT_EQ((scalar.view<float, 0>()()), 5.0f);
  EXPECT_TRUE(scalar.defined());
  EXPECT_FALSE(TensorRef().defined());
}

TEST(TensorRefDeathTest, ChecksTypeRankAndRange) {
  std::vector<float> values = Numbers(6);
  const TensorRef tensor(values.data(), DType::kF32, Device{}, Shape({3, 2}));
  EXPECT_DEATH(tensor.data<double>(), "tensor is f32");
  EXPECT_DEATH((tensor.view<float, 1>()), "tensor \\[3, 2\\]");
  EXPECT_DEATH(tensor.Rows(2, 4), "rows \\[2, 4\\) of \\[3, 2\\]");
  EXPECT_DEATH(tensor.Reshaped(Shape({5})), "\\[3, 2\\] -> \\[5\\]");
}

TEST(Device, Names) {
  EXPECT_EQ(ToString(Device{}), "cpu");
  EXPECT_EQ(ToString(Device{DeviceKind::kCuda, 3}), "cuda:3");
}

}  // namespace
}  // namespace annulus
