#include "annulus/ops/rope.h"

#include "ops/harness.h"

namespace annulus::testing {
namespace {

constexpr double kTheta = 10000;

template <typename T>
class RopeTest : public ::testing::Test {};
TYPED_TEST_SUITE(RopeTest, FloatTypes);

// Angles stay in long double, as the op promises at least double for them in every dtype.
template <typename W>
std::vector<W> Reference(std::vector<W> x, int64_t batch_heads, int64_t dim,
                         const std::vector<int64_t>& positions, int sign) {
  const int64_t half = dim / 2;
  for (size_t row = 0; row < positions.size(); ++row) {
    for (int64_t h = 0; h < batch_heads; ++h) {
      W* head = x.data() + (static_cast<int64_t>(row) * batch_heads + h) * dim;
      for (int64_t i = 0; i < half; ++i) {
        const long double power = -2.0L * static_cast<long double>(i) / static_cast<long double>(dim);
        const long double angle = sign * static_cast<long double>(positions[row]) *
                                  std::pow(static_cast<long double>(kTheta), power);
        const W cosine = static_cast<W>(std::cos(angle)), sine = static_cast<W>(std::sin(angle));
        const W low = head[i], high = head[i + half];
        head[i] = low * cosine - high * sine;
        head[i + half] = low * sine + high * cosine;
      }
    }
  }
  return x;
}

TYPED_TEST(RopeTest, MatchesLoopsInBothDirections) {
  using T = TypeParam;
  Context ctx{Device{}};
  const std::vector<std::vector<int64_t>> position_sets = {{}, {5}, {0, 1, 2, 3, 4}, {3, 7, 11, 2000, 2}};
  for (const auto& positions : position_sets) {
    for (const int64_t dim : {0, 2, 32, 34}) {
      for (const BatchOrder order : {BatchOrder::kInsideRows, BatchOrder::kOutsideRows}) {
        for (const RopeDirection direction : {RopeDirection::kForward, RopeDirection::kInverse}) {
          const typename StridedHeads<T>::Dims dims{static_cast<int64_t>(positions.size()), 2, 3, dim};
          const auto values = NormalValues<T>(dims.elements(), "x");
          StridedHeads<T> x(dims, order, values);
          Guarded<int64_t> rows({dims.rows}, positions);
          ANNULUS_CHECK_OK(Rope(ctx, rows.ref(), kTheta, direction, x.ref()));
          const int sign = direction == RopeDirection::kForward ? 1 : -1;
          // An angle in double, up to 2000 radians here, is off by its last bit.
          const double angle_ulps = std::is_same_v<T, double> ? 2000 : 1;
          ExpectMatches<T>(
              x.values(), [&]<class W>() { return Reference<W>(Cast<W>(values), 6, dim, positions, sign); },
              angle_ulps * MaxAbs(values));
        }
      }
    }
  }
}

// An f32 angle would be off by 0.06 radians here.
TEST(Rope, FarPositionsKeepTheirAngle) {
  Context ctx{Device{}};
  Guarded<int64_t> positions({1}, {1000003});
  const auto values = NormalValues<float>(64, "x");
  StridedHeads<float> x({1, 1, 1, 64}, BatchOrder::kInsideRows, values);
  ANNULUS_CHECK_OK(Rope(ctx, positions.ref(), kTheta, RopeDirection::kForward, x.ref()));
  ExpectMatches<float>(
      x.values(), [&]<class W>() { return Reference<W>(Cast<W>(values), 1, 64, positions.values(), 1); });
}

// A rotation's gradient is its inverse: <R x, y> = <x, R^-1 y>.
TEST(Rope, TheInverseIsTheGradient) {
  Context ctx{Device{}};
  Guarded<int64_t> positions({2}, {4, 9});
  const StridedHeads<double>::Dims dims{2, 1, 2, 6};
  StridedHeads<double> dx(dims, BatchOrder::kInsideRows, NormalValues<double>(dims.elements(), "dy"));
  const auto dy = dx.values();
  ANNULUS_CHECK_OK(Rope(ctx, positions.ref(), kTheta, RopeDirection::kInverse, dx.ref()));
  auto input = NormalValues<double>(dims.elements(), "x");
  ExpectGradient(
      [&] {
        StridedHeads<double> x(dims, BatchOrder::kInsideRows, input);
        ANNULUS_CHECK_OK(Rope(ctx, positions.ref(), kTheta, RopeDirection::kForward, x.ref()));
        return Dot(x.values(), dy);
      },
      input.data(), dx.values());
}

TEST(RopeArguments, AreRefusedByName) {
  Context ctx{Device{}};
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  StridedHeads<float> odd({2, 1, 1, 3}, BatchOrder::kInsideRows, std::vector<float>(6));
  StridedHeads<float> x({2, 1, 1, 4}, BatchOrder::kInsideRows, std::vector<float>(8));
  Guarded<int64_t> two({2}, {0, 1}), one({1}, {0});
  Guarded<int32_t> narrow({2}, {0, 1});
  const auto rope = [&](auto& positions, double theta, HeadsRef heads) {
    return Rope(ctx, positions.ref(), theta, RopeDirection::kForward, heads);
  };
  ExpectRefused(rope(two, kTheta, odd.ref()), kInvalid, "rope.head_dim=3");
  ExpectRefused(rope(one, kTheta, x.ref()), kInvalid, "rope.positions=i64[1] on cpu: expected i64[2] on cpu");
  ExpectRefused(rope(narrow, kTheta, x.ref()), kInvalid, "rope.positions=i32[2] on cpu: expected i64[2]");
  ExpectRefused(rope(two, 0, x.ref()), kInvalid, "rope.theta=0");
  HeadsRef bf16 = x.ref();
  bf16.dtype = DType::kBF16;
  ExpectRefused(rope(two, kTheta, bf16), kInvalid, "rope.x.dtype=bf16: expected f32 or f64");
  HeadsRef overlapping = x.ref();
  overlapping.row_stride = 3;
  ExpectRefused(rope(two, kTheta, overlapping), kInvalid, "rope.x.row_stride=3: expected at least 4");
}

}  // namespace
}  // namespace annulus::testing
