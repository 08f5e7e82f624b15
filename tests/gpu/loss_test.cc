// The chunked loss on GPU 0 through the public API, of whole vocabularies and of parts. Fails where there is
// none.

#include "annulus/ops/cross_entropy.h"
#include "annulus/ops/elementwise.h"
#include "gpu/gpu_harness.h"
#include "ops/reference.h"

namespace annulus::testing {
namespace {

using reference::At;

template <typename T>
class GpuLoss : public ::testing::Test {};
using GpuTypes = ::testing::Types<float, BFloat16>;
TYPED_TEST_SUITE(GpuLoss, GpuTypes);

struct LossShape {
  int64_t tokens, d, vocab, chunk;
};

// Every fourth token is not counted.
std::vector<int32_t> Targets(const LossShape& s) {
  const RandomStream random(7, "targets");
  std::vector<int32_t> targets;
  for (int64_t t = 0; t < s.tokens; ++t) {
    const auto draw = random.Below(static_cast<uint64_t>(t), static_cast<uint64_t>(s.vocab));
    targets.push_back(t % 4 == 3 ? -100 : static_cast<int32_t>(draw));
  }
  return targets;
}

constexpr double kLossScale = 0.125;

template <typename T>
struct LossProblem {
  explicit LossProblem(const LossShape& s)
      : shape(s),
        x(Normal<T>(s.tokens * s.d, "x")),
        w(Normal<T>(s.vocab * s.d, "w", 0.3)),
        dw(Normal<float>(s.vocab * s.d, "dw", 0.1)),
        targets(Targets(s)) {}

  // dx, dw, the loss with gradients and the loss alone
  Outputs operator()(auto& run) const {
    const LossShape& s = shape;
    const TensorRef xs = run.In({s.tokens, s.d}, x), ws = run.In({s.vocab, s.d}, w),
                    ids = run.Of({s.tokens}, targets), dxs = run.Out({s.tokens, s.d}),
                    dws = run.InAccum({s.vocab, s.d}, dw), loss = run.Scalar(0.5), alone = run.Scalar(0.5);
    const LinearCrossEntropy args{.x = xs, .w = ws, .targets = ids, .chunk_tokens = s.chunk};
    ANNULUS_CHECK_OK(
        LinearCrossEntropyForwardBackward(run.ctx, args, {.scale = kLossScale, .dx = dxs, .dw = dws}, loss));
    ANNULUS_CHECK_OK(LinearCrossEntropyForward(run.ctx, args, alone));
    const double norm = 20 * static_cast<double>(s.tokens);  // logits are of this order
    return {run.Rounded(dxs), run.Summed(dws, MaxAbs(x)), run.SummedInDouble(loss, norm),
            run.SummedInDouble(alone, norm)};
  }

  LossShape shape;
  std::vector<double> x, w, dw;
  std::vector<int32_t> targets;
};

struct NaiveGradients {
  std::vector<double> dx, dw;  // dw: of the whole vocabulary
};

// The share in the gradients of targets [begin, end). In bf16 the gradient of the logits is rounded before
// the products with it.
NaiveGradients NaiveGradientsOf(const LossProblem<BFloat16>& p, int64_t begin, int64_t end) {
  const LossShape& s = p.shape;
  NaiveGradients naive{.dx = std::vector<double>(p.x.size()), .dw = p.dw};
  for (int64_t t = 0; t < s.tokens; ++t) {
    const int32_t target = p.targets[static_cast<size_t>(t)];
    if (target < 0) continue;
    const auto probability = reference::SoftmaxAndLogSum(p.x, p.w, {s.tokens, s.d, s.vocab}, t);
    for (int64_t v = begin; v < end; ++v) {
      const double exact = kLossScale * (probability[static_cast<size_t>(v)] - (v == target ? 1 : 0));
      const double dlogit = ToDouble(FromDouble<BFloat16>(exact));
      for (int64_t i = 0; i < s.d; ++i) {
        naive.dx[At(t, i, s.d)] += dlogit * p.w[At(v, i, s.d)];
        naive.dw[At(v, i, s.d)] += dlogit * p.x[At(t, i, s.d)];
      }
    }
  }
  return naive;
}

Outputs NaiveLoss(const LossProblem<BFloat16>& p) {
  Outputs naive = NaiveOf<BFloat16>(p);
  const NaiveGradients gradients = NaiveGradientsOf(p, 0, p.shape.vocab);
  naive[0].values = Rounded<BFloat16>(gradients.dx);
  naive[1].values = Rounded<float>(gradients.dw);
  return naive;
}
Outputs NaiveLoss(const LossProblem<float>& p) { return NaiveOf<float>(p); }

template <typename T>
void ExpectLoss(const LossShape& s) {
  SCOPED_TRACE(absl::StrCat(s.tokens, " ", s.d, " ", s.vocab));
  const LossProblem<T> problem(s);
  ExpectOnGpu<T>(problem, NaiveLoss(problem));
}

TYPED_TEST(GpuLoss, LossEdges) {
  for (const LossShape& s :
       {LossShape{0, 8, 5, 8}, LossShape{1, 8, 1, 8}, LossShape{5, 0, 7, 8}, LossShape{7, 3, 17, 8},
        LossShape{9, 8, 64, 1}, LossShape{33, 24, 517, 8}, LossShape{4, 8, 1023, 8192}}) {
    ExpectLoss<TypeParam>(s);
  }
}

// All in registers and a little more; one, two, three, five and nine CTAs a row.
TYPED_TEST(GpuLoss, LossOfCtasEdges) {
  for (const int64_t vocab : {8192, 8195, 36096, 36097, 72193, 144385, 288769}) {
    ExpectLoss<TypeParam>({3, 8, vocab, 8});
  }
}

// Up to the largest vocabulary.
TYPED_TEST(GpuLoss, LossAtSize) {
  for (const LossShape& s :
       {LossShape{100, 64, 1000, 32}, LossShape{9, 16, 18435, 8192}, LossShape{6, 8, 32000, 4},
        LossShape{6, 8, 50257, 8192}, LossShape{5, 8, 128256, 8192}, LossShape{3, 8, 458752, 8192}}) {
    ExpectLoss<TypeParam>(s);
  }
  ExpectSameBitsTwice<TypeParam>(LossProblem<TypeParam>({100, 64, 50257, 32}));
}

// Each cluster takes several: the next row comes while one is worked on.
TYPED_TEST(GpuLoss, LossOfMoreRowsThanTheDeviceHolds) {
  for (const LossShape& s : {LossShape{1501, 8, 1003, 8192}, LossShape{301, 8, 56325, 8192}}) {
    ExpectLoss<TypeParam>(s);
  }
}

// Parts of the vocabulary, one after the other: a first round writes their stats down, a second combines
// them.
template <typename T>
struct PartsProblem {
  LossProblem<T> whole;
  std::vector<int64_t> begins;  // of the parts, and the end of the last

  // For each part its summand of dx, its rows of dw, the loss with gradients and the loss alone.
  Outputs operator()(auto& run) const {
    std::vector<std::vector<Tensor>> stats(parts());  // by part, by chunk
    for (size_t p = 0; p < parts(); ++p) {
      RunPart(run, p, [&](TensorRef own) {
        stats[p].emplace_back(run.ctx.device, own.dtype(), own.shape());
        return Copy(run.ctx, own, stats[p].back().ref());
      });
    }
    Outputs outputs;
    for (size_t p = 0; p < parts(); ++p) {
      size_t call = 0;  // two passes over the same chunks
      const Outputs of_part = RunPart(run, p, [&](TensorRef own) {
        const size_t chunk = call++ % (stats[p].size() / 2);
        const int64_t rows = own.dim(0), count = static_cast<int64_t>(parts());
        const Tensor all(run.ctx.device, own.dtype(), {count * rows, 2});
        for (int64_t q = 0; q < count; ++q) {
          const TensorRef of = stats[static_cast<size_t>(q)][chunk].ref();
          ANNULUS_CHECK_OK(Copy(run.ctx, of, all.ref().Rows(q * rows, (q + 1) * rows)));
        }
        return MergeVocabularyStats(run.ctx, all.ref().Reshaped({count, rows, 2}), own);
      });
      outputs.insert(outputs.end(), of_part.begin(), of_part.end());
    }
    return outputs;
  }
  size_t parts() const { return begins.size() - 1; }

 private:
  Outputs RunPart(auto& run, size_t p, const std::function<absl::Status(TensorRef)>& combine) const {
    const LossShape& s = whole.shape;
    const int64_t rows = begins[p + 1] - begins[p];
    const auto rows_of = [&](const std::vector<double>& all) {
      return std::vector<double>(all.begin() + begins[p] * s.d, all.begin() + begins[p + 1] * s.d);
    };
    const TensorRef xs = run.In({s.tokens, s.d}, whole.x), ws = run.In({rows, s.d}, rows_of(whole.w)),
                    ids = run.Of({s.tokens}, whole.targets), dxs = run.Out({s.tokens, s.d}),
                    dws = run.InAccum({rows, s.d}, rows_of(whole.dw)), loss = run.Scalar(0.5),
                    alone = run.Scalar(0.5);
    const LinearCrossEntropy args{.x = xs,
                                  .w = ws,
                                  .targets = ids,
                                  .chunk_tokens = s.chunk,
                                  .part = {.begin = begins[p], .combine = combine}};
    ANNULUS_CHECK_OK(
        LinearCrossEntropyForwardBackward(run.ctx, args, {.scale = kLossScale, .dx = dxs, .dw = dws}, loss));
    ANNULUS_CHECK_OK(LinearCrossEntropyForward(run.ctx, args, alone));
    const double norm = 20 * static_cast<double>(s.tokens);
    return {run.Rounded(dxs, 1), run.Summed(dws, MaxAbs(whole.x)), run.SummedInDouble(loss, norm),
            run.SummedInDouble(alone, norm)};
  }
};

Outputs NaiveParts(const PartsProblem<float>& p) { return NaiveOf<float>(p); }
Outputs NaiveParts(const PartsProblem<BFloat16>& p) {
  Outputs naive = NaiveOf<BFloat16>(p);
  const int64_t d = p.whole.shape.d;
  for (size_t part = 0; part < p.parts(); ++part) {
    const int64_t begin = p.begins[part], end = p.begins[part + 1];
    const NaiveGradients gradients = NaiveGradientsOf(p.whole, begin, end);
    naive[4 * part].values = Rounded<BFloat16>(gradients.dx);
    naive[4 * part + 1].values =
        Rounded<float>({gradients.dw.begin() + begin * d, gradients.dw.begin() + end * d});
  }
  return naive;
}

TYPED_TEST(GpuLoss, LossOfPartsOfTheVocabulary) {
  const std::pair<LossShape, std::vector<int64_t>> cases[] = {{{7, 8, 17, 8}, {0, 17}},
                                                              {{33, 24, 517, 8}, {0, 259, 517}},
                                                              {{9, 8, 64, 2}, {0, 1, 2, 64}},
                                                              {{100, 64, 1000, 32}, {0, 333, 667, 1000}},
                                                              {{3, 8, 112643, 8}, {0, 28161, 56322, 112643}}};
  for (const auto& [shape, begins] : cases) {
    SCOPED_TRACE(absl::StrCat(shape.tokens, " ", shape.d, " ", shape.vocab));
    const PartsProblem<TypeParam> problem{LossProblem<TypeParam>(shape), begins};
    ExpectOnGpu<TypeParam>(problem, NaiveParts(problem));
    ExpectSameBitsTwice<TypeParam>(problem);
  }
}

// exp of these logits overflows; one token is all but certain, the other hopeless.
TYPED_TEST(GpuLoss, LargeLogitsDoNotOverflow) {
  OpRun<TypeParam> run(kGpu);
  const TensorRef x = run.In({2, 1}, {1, 1}), w = run.In({3, 1}, {4096, -2048, 0}), dx = run.Out({2, 1}),
                  dw = run.InAccum({3, 1}, {0, 0, 0}), loss = run.Scalar(0),
                  targets = run.Of({2}, std::vector<int32_t>{0, 1});
  ANNULUS_CHECK_OK(LinearCrossEntropyForwardBackward(run.ctx, {.x = x, .w = w, .targets = targets},
                                                     {.dx = dx, .dw = dw}, loss));
  EXPECT_EQ(run.template Read<double>(loss)[0], 6144);
  EXPECT_EQ(run.Rounded(dx).values, (std::vector<double>{0, 6144}));
  EXPECT_EQ(run.Summed(dw).values, (std::vector<double>{1, -1, 0}));
}

// NaN must reach the loss, where the step is given up.
TYPED_TEST(GpuLoss, NanReachesTheLoss) {
  for (const double bad : {static_cast<double>(NAN), HUGE_VAL}) {
    OpRun<TypeParam> run(kGpu);
    const TensorRef x = run.In({2, 1}, {1, bad}), w = run.In({300, 1}, Normal<TypeParam>(300, "w")),
                    loss = run.Scalar(0), targets = run.Of({2}, std::vector<int32_t>{0, 1});
    ANNULUS_CHECK_OK(LinearCrossEntropyForward(run.ctx, {.x = x, .w = w, .targets = targets}, loss));
    EXPECT_FALSE(std::isfinite(run.template Read<double>(loss)[0]));
  }
}

// What a plan of memory counts on is exactly what a call takes.
TYPED_TEST(GpuLoss, LossScratchIsWhatItIsSaidToBe) {
  for (const auto& [tokens, vocab] :
       std::vector<std::pair<int64_t, int64_t>>{{3, 5}, {8200, 70}, {100, 50257}}) {
    OpRun<TypeParam> run(kGpu);
    const TensorRef x = run.In({tokens, 8}, Normal<TypeParam>(tokens * 8, "x")),
                    w = run.In({vocab, 8}, Normal<TypeParam>(vocab * 8, "w")), loss = run.Scalar(0),
                    targets = run.Of({tokens}, std::vector<int32_t>(static_cast<size_t>(tokens)));
    ANNULUS_CHECK_OK(LinearCrossEntropyForward(run.ctx, {.x = x, .w = w, .targets = targets}, loss));
    EXPECT_EQ(run.ctx.scratch.high_water_bytes(),
              LinearCrossEntropyScratchBytes(DeviceKind::kCuda, DTypeOf<TypeParam>(), tokens, vocab));
    const VocabularyPart part{.begin = 0, .combine = [](TensorRef) { return absl::OkStatus(); }};
    ANNULUS_CHECK_OK(
        LinearCrossEntropyForward(run.ctx, {.x = x, .w = w, .targets = targets, .part = part}, loss));
    EXPECT_EQ(run.ctx.scratch.high_water_bytes(),
              LinearCrossEntropyScratchBytes(DeviceKind::kCuda, DTypeOf<TypeParam>(), tokens, vocab,
                                             VocabularyHeld::kPart));
  }
}

}  // namespace
}  // namespace annulus::testing
