#include "annulus/ops/latent_kv.h"

#include "ops/harness.h"
#include "ops/reference.h"

namespace annulus::testing {
namespace {

using reference::At;

constexpr LatentHeads kSizes[] = {
    {.heads = 1, .nope = 1, .rope = 2, .v = 1},
    {.heads = 3, .nope = 5, .rope = 4, .v = 7},
    {.heads = 4, .nope = 8, .rope = 2, .v = 8},
    {.heads = 0, .nope = 8, .rope = 2, .v = 8},
};

// By element of the result, where packing goes by head.
template <typename W>
std::vector<W> Packed(const LatentHeads& s, int64_t tokens, const std::vector<W>& up,
                      const std::vector<W>& k_rope) {
  std::vector<W> kv;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = 0; c < s.kv_columns(); ++c) {
      const bool key = c < s.heads * s.k_dim();
      const int64_t dim = key ? s.k_dim() : s.v, in = key ? c : c - s.heads * s.k_dim();
      const int64_t head = in / dim, i = in % dim, first = head * (s.nope + s.v);
      if (key && i >= s.nope) {
        kv.push_back(k_rope[At(t, i - s.nope, s.rope)]);
      } else {
        kv.push_back(up[At(t, first + i + (key ? 0 : s.nope), s.up_columns())]);
      }
    }
  }
  return kv;
}

template <typename T>
class LatentKvTest : public ::testing::Test {};
TYPED_TEST_SUITE(LatentKvTest, FloatTypes);

TYPED_TEST(LatentKvTest, PacksEveryElement) {
  using T = TypeParam;
  Context ctx{Device{}};
  for (const LatentHeads& s : kSizes) {
    for (const int64_t tokens : {0, 1, 5}) {
      SCOPED_TRACE(absl::StrCat(s.heads, " heads, ", tokens, " tokens"));
      const auto values = NormalValues<T>(tokens * s.up_columns(), "up"),
                 rope = NormalValues<T>(tokens * s.rope, "rope");
      Guarded<T> up({tokens, s.up_columns()}, values), kv({tokens, s.kv_columns()});
      StridedMatrix<T> k_rope(tokens, s.rope, 3, rope);
      ANNULUS_CHECK_OK(PackLatentKv(ctx, s, up.ref(), k_rope.ref(), kv.ref()));
      EXPECT_EQ(kv.values(), Packed(s, tokens, values, rope));
    }
  }
}

// <Pack(up, rope), dkv> = <up, dup> + <rope, dk_rope>: packing copies, so with small integers exactly.
TYPED_TEST(LatentKvTest, UnpackingIsTheAdjoint) {
  using T = TypeParam;
  Context ctx{Device{}};
  const auto integers = [](int64_t n, const char* stream) {
    std::vector<T> values = NormalValues<T>(n, stream, 5);
    for (T& value : values) value = std::round(value);
    return values;
  };
  for (const LatentHeads& s : kSizes) {
    for (const Write write : {Write::kOverwrite, Write::kAccumulate}) {
      const int64_t tokens = 4;
      const auto values = integers(tokens * s.up_columns(), "up"), rope = integers(tokens * s.rope, "rope");
      const auto gradient = integers(tokens * s.kv_columns(), "dkv"), before = integers(tokens * s.rope, "b");
      Guarded<T> dkv({tokens, s.kv_columns()}, gradient), dup({tokens, s.up_columns()});
      StridedMatrix<T> dk_rope(tokens, s.rope, 3, before);
      ANNULUS_CHECK_OK(UnpackLatentKvGradient(ctx, s, dkv.ref(), dup.ref(), write, dk_rope.ref()));
      std::vector<T> of_call = dk_rope.values();
      if (write == Write::kAccumulate) {
        for (size_t i = 0; i < of_call.size(); ++i) of_call[i] -= before[i];
      }
      const auto product = [](const std::vector<T>& a, const std::vector<T>& b) {
        return Dot(Cast<double>(a), Cast<double>(b));
      };
      EXPECT_EQ(product(Packed(s, tokens, values, rope), gradient),
                product(values, dup.values()) + product(rope, of_call));
    }
  }
}

TEST(LatentKvArguments, AreRefusedByName) {
  Context ctx{Device{}};
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  const LatentHeads s{.heads = 2, .nope = 3, .rope = 2, .v = 1};
  Guarded<float> up({4, 8}, 1.0f), rope({4, 2}, 1.0f), kv({4, 12}, 1.0f), narrow({4, 3}, 1.0f);
  Guarded<double> wide({4, 12}, 1.0);
  ExpectRefused(PackLatentKv(ctx, s, narrow.ref(), rope.ref(), kv.ref()), kInvalid, "latent_kv.up=");
  ExpectRefused(PackLatentKv(ctx, s, up.ref(), narrow.ref(), kv.ref()), kInvalid, "latent_kv.k_rope=");
  ExpectRefused(PackLatentKv(ctx, s, up.ref(), rope.ref(), narrow.ref()), kInvalid, "latent_kv.kv=");
  ExpectRefused(PackLatentKv(ctx, {.heads = -1}, up.ref(), rope.ref(), kv.ref()), kInvalid,
                "latent_kv.heads=-1");
  const auto unpack = [&](auto& dkv, auto& dup, auto& dk_rope) {
    return UnpackLatentKvGradient(ctx, s, dkv.ref(), dup.ref(), Write::kOverwrite, dk_rope.ref());
  };
  ExpectRefused(unpack(wide, up, rope), kInvalid, "latent_kv.dkv=");
  ExpectRefused(unpack(kv, narrow, rope), kInvalid, "latent_kv.dup=");
  ExpectRefused(unpack(kv, up, narrow), kInvalid, "latent_kv.dk_rope=");
}

}  // namespace
}  // namespace annulus::testing
