#include "annulus/base/status.h"

#include <gtest/gtest.h>

#include <memory>

#include "annulus/base/check.h"
#include "annulus/base/dtype.h"

namespace annulus {
namespace {

absl::StatusOr<std::unique_ptr<int>> Positive(int value) {
  if (value < 1) return Invalid("value=", value, ": expected at least 1");
  return std::make_unique<int>(value);
}

absl::StatusOr<int> Sum(int a, int b) {
  ANNULUS_ASSIGN_OR_RETURN(const std::unique_ptr<int> x, Positive(a));
  ANNULUS_ASSIGN_OR_RETURN(const std::unique_ptr<int> y, Positive(b));
  ANNULUS_RETURN_IF_ERROR(*x + *y > 100 ? Invalid("sum") : absl::OkStatus());
  return *x + *y;
}

TEST(Status, MacrosPassValuesAndErrors) {
  EXPECT_EQ(Sum(1, 2).value(), 3);
  EXPECT_EQ(Sum(1, -2).status(), absl::InvalidArgumentError("value=-2: expected at least 1"));
  EXPECT_EQ(Sum(99, 2).status(), absl::InvalidArgumentError("sum"));
}

TEST(Status, PrefixedKeepsTheCode) {
  EXPECT_EQ(Prefixed(absl::DataLossError("gone"), "file: "), absl::DataLossError("file: gone"));
  EXPECT_TRUE(Prefixed(absl::OkStatus(), "file: ").ok());
}

TEST(Check, PassesWithoutEvaluatingItsMessage) {
  int evaluated = 0;
  ANNULUS_CHECK(true) << ++evaluated;
  if (evaluated > 0)
    ANNULUS_CHECK(false);
  else
    ANNULUS_CHECK(true);  // binds as one statement
  ANNULUS_CHECK_OK(absl::OkStatus());
  EXPECT_EQ(evaluated, 0);
}

TEST(CheckDeathTest, EndsTheProcessWithItsMessage) {
  const int rows = 3;
  EXPECT_EXIT(ANNULUS_CHECK(rows == 4) << "rows " << rows, ::testing::ExitedWithCode(kInvariantExitCode),
              "status_test.cc:[0-9]+: rows == 4 rows 3");
  EXPECT_EXIT(ANNULUS_CHECK_OK(absl::DataLossError("torn")), ::testing::ExitedWithCode(kInvariantExitCode),
              "DATA_LOSS: torn");
  setenv("OMPI_COMM_WORLD_RANK", "5", 1);
  EXPECT_EXIT(ANNULUS_CHECK(rows == 4), ::testing::ExitedWithCode(kInvariantExitCode), "world rank 5");
  unsetenv("OMPI_COMM_WORLD_RANK");
}

TEST(DType, SizesNamesAndTypes) {
  static_assert(DTypeOf<float>() == DType::kF32 && DTypeOf<const double>() == DType::kF64);
  static_assert(DTypeOf<int32_t>() == DType::kI32 && DTypeOf<int64_t>() == DType::kI64);
  static_assert(DTypeOf<uint8_t>() == DType::kU8);
  static_assert(SizeOf(DType::kF32) == sizeof(float) && SizeOf(DType::kF64) == sizeof(double));
  static_assert(SizeOf(DType::kI32) == 4 && SizeOf(DType::kI64) == 8 && SizeOf(DType::kU8) == 1);
  static_assert(AccumOf(DType::kF32) == DType::kF32 && AccumOf(DType::kF64) == DType::kF64);
  EXPECT_EQ(Name(DType::kF32), "f32");
  EXPECT_EQ(Name(DType::kU8), "u8");
  EXPECT_EQ(VisitFloat(DType::kF32, []<typename T>() { return sizeof(T); }), sizeof(float));
  EXPECT_EQ(VisitFloat(DType::kF64, []<typename T>() { return sizeof(T); }), sizeof(double));
  EXPECT_DEATH(VisitFloat(DType::kI32, []<typename T>() { return sizeof(T); }), "dtype i32");
}

}  // namespace
}  // namespace annulus
