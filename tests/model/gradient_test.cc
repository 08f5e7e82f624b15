// Gradients against central differences of fourth order, in f64.

#include <gtest/gtest.h>

#include "model/mesh_run.h"

namespace annulus::testing {
namespace {

// df/dx with an error of h^4 f'''''(x) / 30 and, from rounding, about 2 epsilon |f| / h: near 1e-12 each
// here.
constexpr double kStep = 1e-3;
double Slope(const std::function<double()>& f, double* x) {
  const double before = *x;
  const auto at = [&](double steps) {
    *x = before + steps * kStep;
    return f();
  };
  const double slope = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * kStep);
  *x = before;
  return slope;
}

constexpr double kTolerance = 1e-7;  // relative to the largest entry of the gradient

// Compares `samples` entries of dx, spread over the tensor and the first and last among them.
void ExpectSlopes(const std::function<double()>& f, TensorRef x, TensorRef dx, int64_t samples,
                  absl::string_view name) {
  const std::vector<double> gradient = Doubles(dx);
  double largest = 0;
  for (double g : gradient) largest = std::max(largest, std::abs(g));
  ASSERT_GT(largest, 0) << name;
  const int64_t count = std::min(samples, x.elements());
  for (int64_t n = 0; n < count; ++n) {
    const int64_t i = count == 1 ? 0 : n * (x.elements() - 1) / (count - 1);
    EXPECT_NEAR(gradient[static_cast<size_t>(i)], Slope(f, x.data<double>() + i), kTolerance * largest)
        << name << " at " << i;
  }
}

constexpr Recompute kPolicies[] = {Recompute::kNone, Recompute::kElementwise, Recompute::kAttentionOutput,
                                   Recompute::kBlock};

// y = mixer(x) alone, with f = <y, weights>.
class OneMixer {
 public:
  OneMixer(LayerSpec layer, Recompute recompute)
      : spec_(SmallSpec({layer})),
        params_(Device{}, DType::kF64, BuildParamTable(spec_), 1),
        geometry_(SequenceLayout(LayoutKind::kContiguous, kRows, 1), MakeLoopbackGroup(1)[0]),
        x_(Device{}, DType::kF64, kShape()),
        dx_(Device{}, DType::kF64, kShape()),
        y_(Device{}, DType::kF64, kShape()),
        weights_(Device{}, DType::kF64, kShape()) {
    FillRandom(params_);
    geometry_.SetBatch(RandomSequences(5, kRows, kBatch, Lengths::kFull, Documents::kRandom));
    const RandomStream random(1, "mixer");
    for (int64_t i = 0; i < x_.ref().elements(); ++i) {
      x_.ref().data<double>()[i] = random.Normal(static_cast<uint64_t>(2 * i));
      weights_.ref().data<double>()[i] = random.Normal(static_cast<uint64_t>(2 * i + 1));
    }
    mixer_ = layer.kind == LayerKind::kAttention ? MakeAttention(spec_, 0, recompute, params_)
                                                 : MakeMlp(spec_, 0, recompute, params_);
  }

  double Forward(Keep keep) {
    std::fill_n(y_.ref().data<double>(), y_.ref().elements(), 0.0);
    ModelStep step{.geometry = geometry_, .stats = {}};
    ANNULUS_CHECK_OK(mixer_->Forward(ctx_, step, x_.ref(), keep, y_.ref()));
    double sum = 0;
    for (int64_t i = 0; i < y_.ref().elements(); ++i) {
      sum += y_.ref().data<double>()[i] * weights_.ref().data<double>()[i];
    }
    return sum;
  }
  void Backward() {
    ModelStep step{.geometry = geometry_, .stats = {}};
    std::fill_n(dx_.ref().data<double>(), dx_.ref().elements(), 1e6);  // overwritten
    ANNULUS_CHECK_OK(mixer_->Backward(ctx_, step, x_.ref(), weights_.ref(), dx_.ref()));
  }

  TensorRef x() { return x_.ref(); }
  TensorRef dx() { return dx_.ref(); }
  ParamStore& params() { return params_; }

 private:
  static constexpr int64_t kRows = 9, kBatch = 2;
  Shape kShape() const { return {kRows, kBatch, spec_.d_model}; }

  ModelSpec spec_;
  Context ctx_{Device{}};
  ParamStore params_;
  AttentionGeometry geometry_;
  Tensor x_, dx_, y_, weights_;
  std::unique_ptr<SequenceMixer> mixer_;
};

void CheckMixer(LayerSpec layer) {
  for (const Recompute recompute : kPolicies) {
    SCOPED_TRACE(static_cast<int>(recompute));
    OneMixer one(layer, recompute);
    one.Forward(Keep::kForBackward);
    one.Backward();
    const auto f = [&] { return one.Forward(Keep::kNothing); };
    ExpectSlopes(f, one.x(), one.dx(), 40, "x");
    for (const ParamInfo& info : one.params().table().params) {
      if (info.bucket != 1 || info.shape.rank() != 2) continue;  // the norm stands outside of the mixer
      const int i = one.params().table().IndexOf(info.name);
      ExpectSlopes(f, one.params().Value(i), one.params().Grad(i), 20, info.name);
    }
  }
}

TEST(MixerGradients, Attention) { CheckMixer(Attention(0)); }
TEST(MixerGradients, AttentionWithWindowAndWithoutPositions) { CheckMixer(Attention(4, std::nullopt)); }
TEST(MixerGradients, Mlp) { CheckMixer(Mlp()); }

// The mean loss of a whole model, padding and uncounted tokens included.
void CheckModel(const ModelSpec& spec, Recompute recompute) {
  const WholeBatch batch = RandomBatch(
      spec, {.length = 13, .batch = 2, .lengths = Lengths::kRandom, .documents = Documents::kRandom});
  OnMesh(spec, batch, {.recompute = recompute}, [&](RankModel& model) {
    model.LossAndGradients([](int) { return absl::OkStatus(); });
    for (const ParamInfo& info : model.params().table().params) {
      const int i = model.params().table().IndexOf(info.name);
      ExpectSlopes([&] { return model.Loss(); }, model.params().Value(i), model.params().Grad(i), 12,
                   info.name);
    }
  });
}

TEST(ModelGradients, OneBlock) {
  for (const Recompute recompute : kPolicies) CheckModel(SmallSpec({Attention(0), Mlp()}), recompute);
}

TEST(ModelGradients, TwoBlocks) {
  for (const Recompute recompute : kPolicies) {
    CheckModel(SmallSpec({Attention(0), Mlp(), Attention(5), Mlp()}), recompute);
  }
}

TEST(ModelGradients, TiedHead) {
  ModelSpec spec = SmallSpec({Attention(0), Mlp()});
  spec.tied_head = true;
  CheckModel(spec, Recompute::kAttentionOutput);
}

// Gradients are added to what is there, and a bucket is final when it is said to be.
TEST(ModelGradients, BucketsAreFinalInReverseOrder) {
  ModelSpec spec = SmallSpec({Attention(0), Mlp()});
  spec.tied_head = true;  // the head's gradient belongs to the first bucket
  OnMesh(spec, RandomBatch(spec, {.length = 13}), {}, [](RankModel& model) {
    std::vector<int> order;
    std::vector<std::vector<double>> at_call(static_cast<size_t>(model.params().buckets()));
    model.LossAndGradients([&](int bucket) {
      order.push_back(bucket);
      at_call[static_cast<size_t>(bucket)] = Doubles(model.params().BucketGrads(bucket));
      return absl::OkStatus();
    });
    EXPECT_EQ(order, (std::vector<int>{3, 2, 1, 0}));
    for (int bucket = 0; bucket < model.params().buckets(); ++bucket) {
      EXPECT_EQ(at_call[static_cast<size_t>(bucket)], Doubles(model.params().BucketGrads(bucket))) << bucket;
    }
  });
}

}  // namespace
}  // namespace annulus::testing
