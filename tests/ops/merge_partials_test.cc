// Partial results of attention over disjoint keys, merged by their LSE.

#include "annulus/ops/attention.h"
#include "ops/harness.h"

namespace annulus::testing {
namespace {

template <typename T>
class MergePartialsTest : public ::testing::Test {};
TYPED_TEST_SUITE(MergePartialsTest, FloatTypes);

template <typename T>
constexpr T kNoKeys = -std::numeric_limits<T>::infinity();

// What a partial result holds: every third row and head has no keys, and NaN where its output is.
template <typename T>
struct Partial {
  std::vector<T> out, lse;

  Partial(int64_t stats, int64_t dim, absl::string_view stream, size_t first_without_keys)
      : out(NormalValues<T>(stats * dim, stream)),
        lse(NormalValues<T>(stats, absl::StrCat(stream, " lse"), 5)) {
    for (size_t i = first_without_keys; i < lse.size(); i += 3) {
      lse[i] = kNoKeys<T>;
      std::fill_n(out.begin() + static_cast<int64_t>(i) * dim, dim, std::numeric_limits<T>::quiet_NaN());
    }
  }
};

// By weights e^LSE. Where only one has keys it is the result.
template <typename W, typename T>
std::pair<std::vector<W>, std::vector<W>> Merged(const Partial<T>& a, const Partial<T>& b, int64_t dim) {
  std::vector<W> out, lse;
  for (size_t i = 0; i < a.lse.size(); ++i) {
    const W x = a.lse[i], y = b.lse[i];
    lse.push_back(std::log(std::exp(x) + std::exp(y)));
    for (size_t k = i * static_cast<size_t>(dim); k < (i + 1) * static_cast<size_t>(dim); ++k) {
      const W from_a = std::isinf(x) ? W{0} : std::exp(x) * static_cast<W>(a.out[k]);
      const W from_b = std::isinf(y) ? W{0} : std::exp(y) * static_cast<W>(b.out[k]);
      out.push_back(std::isinf(lse.back()) ? W{0} : (from_a + from_b) / (std::exp(x) + std::exp(y)));
    }
  }
  return {out, lse};
}

TYPED_TEST(MergePartialsTest, WeighsByTheSumsOfExponentials) {
  using T = TypeParam;
  using Heads = StridedHeads<T>;
  Context ctx{Device{}};
  for (const BatchOrder order : {BatchOrder::kInsideRows, BatchOrder::kOutsideRows}) {
    for (const int64_t dim : {1, 4, 5, 64, 130}) {
      SCOPED_TRACE(dim);
      const typename Heads::Dims dims{.rows = 7, .batch = 2, .heads = 3, .dim = dim},
          stats{.rows = 7, .batch = 2, .heads = 3, .dim = 1};
      // Rows without keys in one, the other, and (of every nine) both.
      Partial<T> a(stats.elements(), dim, "a", 0), b(stats.elements(), dim, "b", 1);
      for (size_t i = 0; i < a.lse.size(); i += 9) b.lse[i] = kNoKeys<T>;
      Heads out(dims, order, a.out), lse(stats, order, a.lse), into(dims, order, b.out),
          into_lse(stats, order, b.lse);
      ANNULUS_CHECK_OK(MergePartials(
          ctx, {.out = out.ref(), .lse = lse.ref(), .into_out = into.ref(), .into_lse = into_lse.ref()}));
      const auto naive = Merged<T>(a, b, dim);
      const auto wide = Merged<Wide<T>>(a, b, dim);
      ExpectMatches<T>(into.values(), naive.first, wide.first);
      ExpectMatches<T>(into_lse.values(), naive.second, wide.second);
      EXPECT_TRUE(SameBits(out.values(), a.out));
      const std::vector<T> got = into.values();
      for (size_t i = 0; i < a.lse.size(); ++i) {
        if (std::isinf(a.lse[i]) == std::isinf(b.lse[i])) continue;
        const std::vector<T>& only = std::isinf(a.lse[i]) ? b.out : a.out;
        for (size_t k = i * static_cast<size_t>(dim); k < (i + 1) * static_cast<size_t>(dim); ++k) {
          EXPECT_EQ(got[k], only[k]);
        }
        EXPECT_EQ(into_lse.values()[i], std::isinf(a.lse[i]) ? b.lse[i] : a.lse[i]);
      }
    }
  }
}

// Partial results that have sums are those with the logarithms of their sums in the LSE, before and after.
TYPED_TEST(MergePartialsTest, SumsAreMergedUnnormalised) {
  using T = TypeParam;
  constexpr int64_t kDim = 4, kStats = 24;
  const Shape stats = {kStats, 1, 1}, values = {kStats, 1, kDim};
  Context ctx{Device{}};
  Partial<T> a(kStats, kDim, "a", 0), b(kStats, kDim, "b", 1);
  for (size_t i = 0; i < a.lse.size(); i += 9) b.lse[i] = kNoKeys<T>;
  std::vector<T> a_sums, b_sums;
  for (size_t i = 0; i < a.lse.size(); ++i) {
    a_sums.push_back(1 + static_cast<T>(i)), b_sums.push_back(2 / (1 + static_cast<T>(i)));
  }
  Guarded<T> out(values, a.out), lse(stats, a.lse), sum(stats, a_sums), into(values, b.out),
      into_lse(stats, b.lse), into_sum(stats, b_sums);
  ANNULUS_CHECK_OK(MergePartials(ctx, {.out = HeadsOf(out.ref(), 0, 1, kDim),
                                       .lse = HeadsOf(lse.ref(), 0, 1, 1),
                                       .into_out = HeadsOf(into.ref(), 0, 1, kDim),
                                       .into_lse = HeadsOf(into_lse.ref(), 0, 1, 1),
                                       .sum = HeadsOf(sum.ref(), 0, 1, 1),
                                       .into_sum = HeadsOf(into_sum.ref(), 0, 1, 1)}));
  ANNULUS_CHECK_OK(FinishPartial(
      ctx, {.out = HeadsOf(into.ref(), 0, 1, kDim), .lse = into_lse.ref(), .sum = into_sum.ref()}));
  const auto normalised = [&](Partial<T> partial, const std::vector<T>& sums) {
    for (size_t i = 0; i < sums.size(); ++i) {
      partial.lse[i] += std::log(sums[i]);
      for (size_t k = i * kDim; k < (i + 1) * kDim; ++k) partial.out[k] /= sums[i];
    }
    return partial;
  };
  const Partial<T> x = normalised(a, a_sums), y = normalised(b, b_sums);
  const auto naive = Merged<T>(x, y, kDim);
  const auto wide = Merged<Wide<T>>(x, y, kDim);
  ExpectMatches<T>(into.values(), naive.first, wide.first);
  ExpectMatches<T>(into_lse.values(), naive.second, wide.second);
}

TYPED_TEST(MergePartialsTest, LargeSumsDoNotOverflow) {
  using T = TypeParam;
  Context ctx{Device{}};
  Guarded<T> out({1, 1, 1}, std::vector<T>{2}), lse({1, 1, 1}, std::vector<T>{2000}),
      into({1, 1, 1}, std::vector<T>{4}), into_lse({1, 1, 1}, std::vector<T>{2000});
  ANNULUS_CHECK_OK(MergePartials(ctx, {.out = HeadsOf(out.ref(), 0, 1, 1),
                                       .lse = HeadsOf(lse.ref(), 0, 1, 1),
                                       .into_out = HeadsOf(into.ref(), 0, 1, 1),
                                       .into_lse = HeadsOf(into_lse.ref(), 0, 1, 1)}));
  EXPECT_EQ(into.values()[0], T{3});
  EXPECT_EQ(into_lse.values()[0], T{2000} + std::log(T{2}));
}

TEST(MergePartials, RefusesByName) {
  Context ctx{Device{}};
  Guarded<float> x({2, 1, 8}, 0.0f), y({2, 1, 8}, 0.0f), s({2, 1, 2}, 0.0f);
  Guarded<double> wide({2, 1, 2}, 0.0);
  const auto merge = [&](HeadsRef out, HeadsRef lse, HeadsRef into, HeadsRef into_lse) {
    return MergePartials(ctx, {.out = out, .lse = lse, .into_out = into, .into_lse = into_lse});
  };
  const HeadsRef out = HeadsOf(x.ref(), 0, 2, 4), into = HeadsOf(y.ref(), 0, 2, 4),
                 lse = HeadsOf(s.ref(), 0, 2, 1);
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  ANNULUS_CHECK_OK(merge(out, lse, into, lse));
  ExpectRefused(merge(out, HeadsOf(s.ref(), 0, 1, 1), into, lse), kInvalid, "merge.lse=f32[2, 1, 1, 1]");
  ExpectRefused(merge(out, lse, HeadsOf(y.ref(), 0, 4, 2), lse), kInvalid, "merge.into_out=f32[2, 1, 4, 2]");
  ExpectRefused(merge(out, lse, into.Rows(0, 1), lse), kInvalid, "merge.into_out=f32[1, 1, 2, 4]");
  ExpectRefused(merge(out, lse, into, HeadsOf(wide.ref(), 0, 2, 1)), kInvalid,
                "merge.into_lse=f64[2, 1, 2, 1]");
  ExpectRefused(MergePartials(ctx, {.out = out, .lse = lse, .into_out = into, .into_lse = lse, .sum = lse}),
                kInvalid, "merge.into_sum=f32[0, 0, 0, 0]: expected f32[2, 1, 2, 1]");
}

}  // namespace
}  // namespace annulus::testing
