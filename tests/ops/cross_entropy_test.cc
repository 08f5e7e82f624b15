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
    ANNULUS_CHECK_OK(LinearCrossEntropyForward(
        ctx,
        {.x = x.ref(),
         .w = w.ref(),
         .targets = targets.ref(),
         .part = {.begin = 0, .combine = [](TensorRef) { return absl::OkStatus(); }}},
        loss.ref()));
    EXPECT_EQ(
        ctx.scratch.high_water_bytes(),
        LinearCrossEntropyScratchBytes(DeviceKind::kCpu, DTypeOf<T>(), tokens, vocab, VocabularyHeld::kPart));
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

// Parts of a vocabulary, one after the other on one thread: each call of the op is stopped at `combine` by
// the stats of all parts, which a first round has written down.
template <typename T>
struct Parts {
  LossDims dims;
  std::vector<int64_t> begins;  // of the parts, and the end of the last
  int64_t chunk_tokens;
  std::vector<T> x, w;
  std::vector<int32_t> targets;
  Context ctx{Device{}};

  struct Result {
    double loss = 0;
    std::vector<T> dx, dw;  // dx is the sum over parts
  };
  Result Run(double scale) {
    const size_t count = begins.size() - 1;
    std::vector<std::vector<std::vector<T>>> stats(count);  // by part, by chunk
    for (size_t p = 0; p < count; ++p) {
      RunPart(p, scale, [&](TensorRef own) {
        stats[p].emplace_back(own.data<T>(), own.data<T>() + own.elements());
        return absl::OkStatus();
      });
    }
    Result total{.loss = 0, .dx = std::vector<T>(x.size()), .dw = {}};
    for (size_t p = 0; p < count; ++p) {
      size_t chunk = 0;
      const Result part = RunPart(p, scale, [&](TensorRef own) {
        std::vector<T> all;
        for (const auto& of_part : stats) all.insert(all.end(), of_part[chunk].begin(), of_part[chunk].end());
        ++chunk;
        Guarded<T> gathered({static_cast<int64_t>(count), own.dim(0), 2}, all);
        return MergeVocabularyStats(ctx, gathered.ref(), own);
      });
      if (p == 0) total.loss = part.loss;
      EXPECT_EQ(part.loss, total.loss) << "every part knows the loss";
      for (size_t i = 0; i < x.size(); ++i) total.dx[i] += part.dx[i];
      total.dw.insert(total.dw.end(), part.dw.begin(), part.dw.end());
    }
    return total;
  }
  Result RunPart(size_t p, double scale, std::function<absl::Status(TensorRef)> combine) {
    const int64_t rows = begins[p + 1] - begins[p], d = dims.d;
    Guarded<T> x_ref({dims.tokens, d}, x), dx({dims.tokens, d}), dw({rows, d}, T{0});
    Guarded<T> w_ref({rows, d}, std::vector<T>(w.begin() + begins[p] * d, w.begin() + begins[p + 1] * d));
    Guarded<int32_t> target_ref({dims.tokens}, targets);
    Guarded<double> loss({1}, 0.0);
    const LinearCrossEntropy args{.x = x_ref.ref(),
                                  .w = w_ref.ref(),
                                  .targets = target_ref.ref(),
                                  .chunk_tokens = chunk_tokens,
                                  .part = {.begin = begins[p], .combine = std::move(combine)}};
    ANNULUS_CHECK_OK(LinearCrossEntropyForwardBackward(
        ctx, args, {.scale = scale, .dx = dx.ref(), .dw = dw.ref()}, loss.ref()));
    return {loss.values()[0], dx.values(), dw.values()};
  }
};

TYPED_TEST(CrossEntropyTest, PartsOfTheVocabularyMakeTheWhole) {
  using T = TypeParam;
  constexpr double kScale = 0.25;
  const LossDims dims{17, 3, 11};
  const auto x = NormalValues<T>(dims.tokens * dims.d, "x"), w = NormalValues<T>(dims.vocab * dims.d, "w");
  const auto targets = Targets(dims.tokens, dims.vocab);
  const auto expected = [&]<class W>() {
    return reference::CrossEntropy<W>(Cast<W>(x), Cast<W>(w), dims, targets, kScale);
  };
  const double loss = static_cast<double>(expected.template operator()<Wide<T>>().loss);
  for (const std::vector<int64_t>& begins :
       std::vector<std::vector<int64_t>>{{0, 11}, {0, 5, 11}, {0, 1, 2, 11}, {0, 4, 8, 11}}) {
    for (const int64_t chunk : {5, 100}) {
      SCOPED_TRACE(absl::StrCat(begins.size() - 1, " parts, chunks of ", chunk));
      const auto got = Parts<T>{dims, begins, chunk, x, w, targets}.Run(kScale);
      const double epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
      EXPECT_NEAR(got.loss, loss, 8 * epsilon * (loss + static_cast<double>(dims.tokens)));
      ExpectMatches<T>(got.dx, [&]<class W>() { return expected.template operator()<W>().dx; }, MaxAbs(w));
      ExpectMatches<T>(got.dw, [&]<class W>() { return expected.template operator()<W>().dw; }, MaxAbs(x));
    }
  }
}

TYPED_TEST(CrossEntropyTest, StatsOfPartsAreMerged) {
  using T = TypeParam;
  Context ctx{Device{}};
  // One token with parts far apart, and one with equal parts.
  Guarded<T> parts({2, 2, 2}, {T{5000}, T{7}, T{1}, T{0}, T{-5000}, T{0}, T{1}, T{-3}}), stats({2, 2});
  ANNULUS_CHECK_OK(MergeVocabularyStats(ctx, parts.ref(), stats.ref()));
  EXPECT_EQ(stats.values()[0], T{5000});
  EXPECT_EQ(stats.values()[1], T{7});
  EXPECT_NEAR(stats.values()[2], 1 + std::log(2.0), 4 * std::numeric_limits<T>::epsilon());
  EXPECT_EQ(stats.values()[3], T{-3});
}

// What fails between the ranks ends the op.
TEST(CrossEntropy, AnErrorOfCombiningIsReturned) {
  Context ctx{Device{}};
  Guarded<double> x({2, 1}, 1.0), w({3, 1}, 1.0), loss({1}, 0.0);
  Guarded<int32_t> targets({2}, {7, 0});  // 7 may lie in another part
  const auto fail = [](TensorRef) { return absl::UnavailableError("a rank is gone"); };
  ExpectRefused(
      LinearCrossEntropyForward(
          ctx, {.x = x.ref(), .w = w.ref(), .targets = targets.ref(), .part = {.begin = 0, .combine = fail}},
          loss.ref()),
      absl::StatusCode::kUnavailable, "a rank is gone");
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
  Guarded<float> parts({2, 3, 2}, 0.0f), stats({3, 2}, 0.0f);
  ExpectRefused(MergeVocabularyStats(ctx, stats.ref(), stats.ref()), kInvalid, "cross_entropy.parts=[3, 2]");
  ExpectRefused(MergeVocabularyStats(ctx, parts.ref(), w.ref()), kInvalid, "cross_entropy.stats=f32[3, 4]");
  ExpectRefused(MergeVocabularyStats(ctx, parts.ref(), stats.ref().Rows(0, 2)), kInvalid,
                "cross_entropy.parts=f32[2, 3, 2] on cpu: expected f32[2, 2, 2] on cpu");
  const LinearCrossEntropy args{.x = x.ref(), .w = w.ref(), .targets = targets.ref()};
  ExpectRefused(LinearCrossEntropyForward(ctx, args, x.ref()), kInvalid,
                "cross_entropy.loss=f32[2, 4] on cpu: expected f64[1] on cpu");
  ExpectRefused(LinearCrossEntropyForwardBackward(ctx, args, {.dx = x.ref(), .dw = dw.ref()}, loss.ref()),
                kInvalid, "cross_entropy.dw=f64[3, 4] on cpu: expected f32[3, 4] on cpu");
}

}  // namespace
}  // namespace annulus::testing
