#include "annulus/ops/cross_entropy.h"

#include "ops/harness.h"
#include "ops/reference.h"

namespace annulus::testing {
namespace {

using reference::LossDims;

template <typename T>
class CrossEntropyTest : public ::testing::Test {};
TYPED_TEST_SUITE(CrossEntropyTest, FloatTypes);

std::vector<int32_t> Targets(int64_t tokens, int64_t vocab) {
  const RandomStream random(7, "targets");
  std::vector<int32_t> targets;
  for (int64_t t = 0; t < tokens; ++t) {
    const auto target =
        static_cast<int32_t>(random.Below(static_cast<uint64_t>(t), static_cast<uint64_t>(vocab)));
    targets.push_back(t % 4 == 1 ? -1 : target);
  }
  return targets;
}

struct Case {
  LossDims dims;
  int64_t chunk_tokens;
};

const Case kCases[] = {
    {{0, 4, 5}, 8},    {{1, 4, 1}, 8},   {{7, 3, 17}, 8},    {{8, 16, 33}, 8},
    {{9, 16, 256}, 8}, {{33, 5, 31}, 1}, {{40, 8, 100}, 16}, {{12, 1, 3}, kLossChunkTokens},
    {{3, 0, 7}, 2},    {{5, 2, 5000}, 4}};

TYPED_TEST(CrossEntropyTest, LossAndGradientsMatchLoops) {
  using T = TypeParam;
  Context ctx{Device{}};
  constexpr double kScale = 0.25;
  for (const auto& [dims, chunk_tokens] : kCases) {
    SCOPED_TRACE(absl::StrCat(dims.tokens, " ", dims.d, " ", dims.vocab));
    const auto x = NormalValues<T>(dims.tokens * dims.d, "x"),
               w = NormalValues<T>(dims.vocab * dims.d, "w", 0.5);
    const auto dw_before = NormalValues<T>(dims.vocab * dims.d, "dw");
    const auto targets = Targets(dims.tokens, dims.vocab);
    Guarded<int32_t> target_ref({dims.tokens}, targets);
    Guarded<double> forward({1}, 0.5), both({1}, 0.5);
    Guarded<T> x_ref({dims.tokens, dims.d}, x), w_ref({dims.vocab, dims.d}, w);
    Guarded<T> dx({dims.tokens, dims.d}), dw({dims.vocab, dims.d}, dw_before);
    const LinearCrossEntropy args{
        .x = x_ref.ref(), .w = w_ref.ref(), .targets = target_ref.ref(), .chunk_tokens = chunk_tokens};
    ANNULUS_CHECK_OK(LinearCrossEntropyForward(ctx, args, forward.ref()));
    ANNULUS_CHECK_OK(LinearCrossEntropyForwardBackward(
        ctx, args, {.scale = kScale, .dx = dx.ref(), .dw = dw.ref()}, both.ref()));
    EXPECT_EQ(forward.values(), both.values());
    const auto expected = [&]<class W>() {
      return reference::CrossEntropy<W>(Cast<W>(x), Cast<W>(w), dims, targets, kScale);
    };
    const double loss = static_cast<double>(expected.template operator()<Wide<T>>().loss);
    const double epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
    EXPECT_NEAR(both.values()[0] - 0.5, loss, 8 * epsilon * (loss + static_cast<double>(dims.tokens)));
    ExpectMatches<T>(dx.values(), [&]<class W>() { return expected.template operator()<W>().dx; }, MaxAbs(w));
    ExpectMatches<T>(
        dw.values(),
        [&]<class W>() {
          auto dws = expected.template operator()<W>().dw;
          for (size_t i = 0; i < dws.size(); ++i) dws[i] += static_cast<W>(dw_before[i]);
          return dws;
        },
        MaxAbs(x));
  }
}

// exp of these logits overflows in f32 and f64 alike; one token is all but certain, the other hopeless.
TYPED_TEST(CrossEntropyTest, LargeLogitsDoNotOverflow) {
  using T = TypeParam;
  Context ctx{Device{}};
  Guarded<T> x({2, 1}, {T{1}, T{1}}), w({3, 1}, {T{5000}, T{-3000}, T{0}});
  Guarded<T> dx({2, 1}), dw({3, 1}, T{0});
  Guarded<int32_t> targets({2}, {0, 1});
  Guarded<double> loss({1}, 0.0);
  ANNULUS_CHECK_OK(LinearCrossEntropyForwardBackward(ctx,
                                                     {.x = x.ref(), .w = w.ref(), .targets = targets.ref()},
                                                     {.dx = dx.ref(), .dw = dw.ref()}, loss.ref()));
  EXPECT_EQ(loss.values()[0], 8000);
  EXPECT_EQ(dx.values(), (std::vector<T>{T{0}, T{8000}}));
  EXPECT_EQ(dw.values(), (std::vector<T>{T{1}, T{-1}, T{0}}));
}

// With NaN as input, any work on an ignored chunk would show.
TYPED_TEST(CrossEntropyTest, IgnoredChunksAreNotComputed) {
  using T = TypeParam;
  Context ctx{Device{}};
  Guarded<T> x({6, 2}), w({3, 2}), dx({6, 2}), dw({3, 2}, T{4});
  Guarded<int32_t> targets({6}, -1);
  Guarded<double> loss({1}, 3.0);
  const LinearCrossEntropy args{.x = x.ref(), .w = w.ref(), .targets = targets.ref(), .chunk_tokens = 4};
  ANNULUS_CHECK_OK(
      LinearCrossEntropyForwardBackward(ctx, args, {.dx = dx.ref(), .dw = dw.ref()}, loss.ref()));
  EXPECT_EQ(loss.values()[0], 3);
  EXPECT_EQ(dx.values(), std::vector<T>(12));
  EXPECT_EQ(dw.values(), std::vector<T>(6, T{4}));
}

TEST(CrossEntropy, ScratchStaysBoundedAtALargeVocabulary) {
  Context ctx{Device{}};
  constexpr int64_t kTokens = 300, kVocab = 128 * 1024;
  Guarded<float> x({kTokens, 1}, NormalValues<float>(kTokens, "x")), w({kVocab, 1}, 0.0f);
  Guarded<int32_t> targets({kTokens}, 5);
  Guarded<double> loss({1}, 0.0);
  ANNULUS_CHECK_OK(
      LinearCrossEntropyForward(ctx, {.x = x.ref(), .w = w.ref(), .targets = targets.ref()}, loss.ref()));
  EXPECT_NEAR(loss.values()[0], kTokens * std::log(static_cast<double>(kVocab)), 1e-6 * kTokens);
  EXPECT_LE(ctx.scratch.high_water_bytes(), int64_t{64} << 20);
}

// What a plan of memory counts on is exactly what a call takes.
TYPED_TEST(CrossEntropyTest, ScratchIsWhatItIsSaidToBe) {
  using T = TypeParam;
  for (const auto& [tokens, vocab] :
       std::vector<std::pair<int64_t, int64_t>>{{3, 5}, {1025, 7}, {40, 70000}}) {
    Context ctx{Device{}};
    Guarded<T> x({tokens, 1}, T{0}), w({vocab, 1}, T{0}), dx({tokens, 1}), dw({vocab, 1}, T{0});
    Guarded<int32_t> targets({tokens}, 0);
    Guarded<double> loss({1}, 0.0);
    ANNULUS_CHECK_OK(LinearCrossEntropyForwardBackward(ctx,
                                                       {.x = x.ref(), .w = w.ref(), .targets = targets.ref()},
                                                       {.dx = dx.ref(), .dw = dw.ref()}, loss.ref()));
    EXPECT_EQ(ctx.scratch.high_water_bytes(),
              LinearCrossEntropyScratchBytes(DeviceKind::kCpu, DTypeOf<T>(), tokens, vocab));
  }
}

// On GPUs logits are f32 in rows of whole 64 elements, with an f32 loss a token; a chunk has 4096 tokens.
TEST(CrossEntropy, ScratchOnGpusIsKnownWithoutOne) {
  const auto bytes = [](int64_t tokens, int64_t vocab) {
    return LinearCrossEntropyScratchBytes(DeviceKind::kCuda, DType::kBF16, tokens, vocab);
  };
  EXPECT_EQ(bytes(100, 50257), 512 + 100 * int64_t{50304} * 4);
  EXPECT_EQ(bytes(100000, 128256), 4096 * 4 + 4096 * int64_t{128256} * 4);
}

TEST(CrossEntropyGradient, AgreesWithFiniteDifferences) {
  Context ctx{Device{}};
  constexpr double kScale = 0.5;
  const LossDims dims{5, 3, 7};
  Guarded<int32_t> targets({dims.tokens}, Targets(dims.tokens, dims.vocab));
  Guarded<double> loss({1}, 0.0);
  Guarded<double> x({dims.tokens, dims.d}, NormalValues<double>(dims.tokens * dims.d, "x"));
  Guarded<double> w({dims.vocab, dims.d}, NormalValues<double>(dims.vocab * dims.d, "w"));
  Guarded<double> dx({dims.tokens, dims.d}), dw({dims.vocab, dims.d}, 0.0);
  const LinearCrossEntropy args{.x = x.ref(), .w = w.ref(), .targets = targets.ref(), .chunk_tokens = 2};
  ANNULUS_CHECK_OK(LinearCrossEntropyForwardBackward(
      ctx, args, {.scale = kScale, .dx = dx.ref(), .dw = dw.ref()}, loss.ref()));
  const auto objective = [&] {
    loss.Set({0.0});
    ANNULUS_CHECK_OK(LinearCrossEntropyForward(ctx, args, loss.ref()));
    return kScale * loss.values()[0];
  };
  ExpectGradient(objective, x.data(), dx.values());
  ExpectGradient(objective, w.data(), dw.values());
}

TEST(CrossEntropyArguments, AreRefusedByName) {
  Context ctx{Device{}};
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  Guarded<float> x({2, 4}, 0.0f), w({3, 4}, 0.0f), narrow({3, 2}, 0.0f);
  Guarded<double> loss({1}, 0.0), dw({3, 4}, 0.0);
  Guarded<int32_t> targets({2}, {0, 2}), high({2}, {-1, 3}), one({1}, {0});
  const auto forward = [&](ConstTensorRef weights, auto& t, int64_t chunk) {
    return LinearCrossEntropyForward(
        ctx, {.x = x.ref(), .w = weights, .targets = t.ref(), .chunk_tokens = chunk}, loss.ref());
  };
  EXPECT_TRUE(forward(w.ref(), targets, 1).ok());
  ExpectRefused(forward(w.ref(), high, 1), absl::StatusCode::kOutOfRange, "cross_entropy.targets[1]=3");
  ExpectRefused(forward(w.ref(), one, 1), kInvalid,
                "cross_entropy.targets=i32[1] on cpu: expected i32[2] on cpu");
  ExpectRefused(forward(w.ref(), targets, 0), kInvalid, "cross_entropy.chunk_tokens=0");
  ExpectRefused(forward(narrow.ref(), targets, 1), kInvalid, "cross_entropy.w=f32[3, 2]");
  ExpectRefused(forward(w.ref().Rows(0, 0), targets, 1), kInvalid, "vocab=0");
  const LinearCrossEntropy args{.x = x.ref(), .w = w.ref(), .targets = targets.ref()};
  ExpectRefused(LinearCrossEntropyForward(ctx, args, x.ref()), kInvalid,
                "cross_entropy.loss=f32[2, 4] on cpu: expected f64[1] on cpu");
  ExpectRefused(LinearCrossEntropyForwardBackward(ctx, args, {.dx = x.ref(), .dw = dw.ref()}, loss.ref()),
                kInvalid, "cross_entropy.dw=f64[3, 4] on cpu: expected f32[3, 4] on cpu");
}

}  // namespace
}  // namespace annulus::testing
