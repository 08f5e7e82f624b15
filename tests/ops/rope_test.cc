#include "annulus/ops/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "ops/harness.h"

namespace annulus::testing {
namespace {

constexpr double kTheta = 10000;

template <typename T>
class RopeTest : public ::testing::Test {};
TYPED_TEST_SUITE(RopeTest, FloatTypes);

// Angles stay in long double, as the op promises at least double for them in every dtype.
template <typename W>
std::vector<W> Reference(std::vector<W> x, int64_t batch_heads, int64_t first, int64_t turned,
                         const std::vector<int64_t>& positions, int sign) {
  const int64_t dim = first + turned, half = turned / 2;
  for (size_t row = 0; row < positions.size(); ++row) {
    for (int64_t h = 0; h < batch_heads; ++h) {
      W* head = x.data() + (static_cast<int64_t>(row) * batch_heads + h) * dim + first;
      for (int64_t i = 0; i < half; ++i) {
        const long double power = -2.0L * static_cast<long double>(i) / static_cast<long double>(turned);
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
        for (const RopeDirection direction : {RopeDirection::kForward, RopeDirection::kGradient}) {
          for (const int64_t first : {0, 5}) {
            const typename StridedHeads<T>::Dims dims{static_cast<int64_t>(positions.size()), 2, 3,
                                                      first + dim};
            const auto values = NormalValues<T>(dims.elements(), "x");
            StridedHeads<T> x(dims, order, values);
            Guarded<int64_t> rows({dims.rows}, positions);
            ANNULUS_CHECK_OK(
                Rope(ctx, rows.ref(), MakeRopeFrequencies(kTheta, dim), direction, x.ref(), first));
            const int sign = direction == RopeDirection::kForward ? 1 : -1;
            // An angle in double, up to 2000 radians here, is off by its last bit.
            const double angle_ulps = std::is_same_v<T, double> ? 2000 : 1;
            ExpectMatches<T>(
                x.values(),
                [&]<class W>() { return Reference<W>(Cast<W>(values), 6, first, dim, positions, sign); },
                angle_ulps * MaxAbs(values));
          }
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
  ANNULUS_CHECK_OK(
      Rope(ctx, positions.ref(), MakeRopeFrequencies(kTheta, 64), RopeDirection::kForward, x.ref()));
  ExpectMatches<float>(
      x.values(), [&]<class W>() { return Reference<W>(Cast<W>(values), 1, 0, 64, positions.values(), 1); });
}

// A rotation's gradient is its inverse, and is scaled as the rotation is: <m R x, y> = <x, m R^-1 y>.
TEST(Rope, TurnsGradientsBack) {
  Context ctx{Device{}};
  RopeFrequencies frequencies = MakeRopeFrequencies(kTheta, 4);
  frequencies.scale = 1.3;
  Guarded<int64_t> positions({2}, {4, 9});
  const StridedHeads<double>::Dims dims{2, 1, 2, 6};
  StridedHeads<double> dx(dims, BatchOrder::kInsideRows, NormalValues<double>(dims.elements(), "dy"));
  const auto dy = dx.values();
  ANNULUS_CHECK_OK(Rope(ctx, positions.ref(), frequencies, RopeDirection::kGradient, dx.ref(), 2));
  auto input = NormalValues<double>(dims.elements(), "x");
  ExpectGradient(
      [&] {
        StridedHeads<double> x(dims, BatchOrder::kInsideRows, input);
        ANNULUS_CHECK_OK(Rope(ctx, positions.ref(), frequencies, RopeDirection::kForward, x.ref(), 2));
        return Dot(x.values(), dy);
      },
      input.data(), dx.values());
}

// As the formulas of Hugging Face's modeling_rope_utils say it, wavelength by wavelength.
TEST(RopeFrequencies, OfLlama3) {
  const Llama3Rope law{.factor = 8, .original_length = 8192, .low_freq_factor = 1, .high_freq_factor = 4};
  const RopeFrequencies frequencies = MakeRopeFrequencies(500000, 128, law);
  ASSERT_EQ(frequencies.pairs(), 64);
  EXPECT_EQ(frequencies.scale, 1);
  int kept = 0, slowed = 0, mixed = 0;
  for (int i = 0; i < 64; ++i) {
    const double plain = 1 / std::pow(500000.0, 2 * i / 128.0), wavelength = 2 * std::numbers::pi / plain;
    double want = plain;
    if (wavelength > 8192.0 / 1) {
      want = plain / 8, ++slowed;
    } else if (wavelength >= 8192.0 / 4) {
      const double smooth = (8192 / wavelength - 1) / (4 - 1);
      want = (1 - smooth) * plain / 8 + smooth * plain, ++mixed;
    } else {
      ++kept;
    }
    EXPECT_NEAR(frequencies.radians[static_cast<size_t>(i)], want, 1e-14 * want) << i;
  }
  EXPECT_EQ(kept, 29);
  EXPECT_EQ(mixed, 6);
  EXPECT_EQ(slowed, 29);
}

// The numbers of DeepSeek-V2-Lite: dim 64, theta 10000, factor 40, 4096 tokens; low = 10, high = 23.
TEST(RopeFrequencies, OfYarn) {
  const YarnRope law{.factor = 40, .original_length = 4096, .mscale = 0.707, .mscale_all_dim = 0.5};
  const RopeFrequencies frequencies = MakeRopeFrequencies(10000, 64, law);
  ASSERT_EQ(frequencies.pairs(), 32);
  for (int i = 0; i < 32; ++i) {
    const double plain = 1 / std::pow(10000.0, 2 * i / 64.0);
    const double mask = 1 - std::clamp((i - 10) / 13.0, 0.0, 1.0);
    const double want = plain / 40 * (1 - mask) + plain * mask;
    EXPECT_NEAR(frequencies.radians[static_cast<size_t>(i)], want, 1e-14 * want) << i;
  }
  EXPECT_NEAR(frequencies.scale, (0.0707 * std::log(40.0) + 1) / (0.05 * std::log(40.0) + 1), 1e-15);
  EXPECT_EQ(YarnScale(0.5, 1), 1);
  EXPECT_NEAR(YarnScale(40, 1), 1.3688879454113936, 1e-15);
}

TEST(RopeArguments, AreRefusedByName) {
  Context ctx{Device{}};
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  StridedHeads<float> odd({2, 1, 1, 3}, BatchOrder::kInsideRows, std::vector<float>(6));
  StridedHeads<float> x({2, 1, 1, 4}, BatchOrder::kInsideRows, std::vector<float>(8));
  Guarded<int64_t> two({2}, {0, 1}), one({1}, {0});
  Guarded<int32_t> narrow({2}, {0, 1});
  const RopeFrequencies frequencies = MakeRopeFrequencies(kTheta, 4);
  const auto rope = [&](auto& positions, HeadsRef heads, int64_t first = 0) {
    return Rope(ctx, positions.ref(), frequencies, RopeDirection::kForward, heads, first);
  };
  ExpectRefused(rope(two, odd.ref()), kInvalid, "rope.head_dim=3: expected the 0 elements that stay");
  ExpectRefused(rope(two, x.ref(), 1), kInvalid, "rope.head_dim=4: expected the 1 elements that stay");
  ExpectRefused(rope(two, x.ref(), -4), kInvalid, "rope.head_dim=4");
  ExpectRefused(rope(one, x.ref()), kInvalid, "rope.positions=i64[1] on cpu: expected i64[2] on cpu");
  ExpectRefused(rope(narrow, x.ref()), kInvalid, "rope.positions=i32[2] on cpu: expected i64[2]");
  HeadsRef bf16 = x.ref();
  bf16.dtype = DType::kBF16;
  ExpectRefused(rope(two, bf16), kInvalid, "rope.x.dtype=bf16: expected f32 or f64");
  HeadsRef overlapping = x.ref();
  overlapping.row_stride = 3;
  ExpectRefused(rope(two, overlapping), kInvalid, "rope.x.row_stride=3: expected at least 4");
}

}  // namespace
}  // namespace annulus::testing
