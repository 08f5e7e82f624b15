// Gradients against central differences of fourth order, in f64.

#include <gtest/gtest.h>

#include "absl/strings/match.h"
#include "model/named_specs.h"

namespace annulus::testing {
namespace {

// df/dx with an error of h^4 f'''''(x) / 30 and, from rounding, about 2 epsilon |f| / h = 1e-11: norms of
// small values bend so sharply that a longer step would see it.
constexpr double kStep = 1e-4;
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

// y = mixer(x) of the first layer alone, with f = <y, weights>.
class OneMixer {
 public:
  OneMixer(const ModelSpec& spec, Recompute recompute)
      : spec_(spec),
        params_(Device{}, DType::kF64, BuildParamTable(spec_), 1),
        geometry_(SequenceLayout(LayoutKind::kContiguous, kRows, 1), MakeLoopbackGroup(1)[0]),
        x_(Device{}, DType::kF64, TokensShape()),
        dx_(Device{}, DType::kF64, TokensShape()),
        y_(Device{}, DType::kF64, TokensShape()),
        weights_(Device{}, DType::kF64, TokensShape()) {
    FillRandom(params_);
    geometry_.SetBatch(RandomSequences(5, kRows, kBatch, Lengths::kFull, Documents::kRandom));
    const RandomStream random(1, "mixer");
    for (int64_t i = 0; i < x_.ref().elements(); ++i) {
      x_.ref().data<double>()[i] = random.Normal(static_cast<uint64_t>(2 * i));
      weights_.ref().data<double>()[i] = random.Normal(static_cast<uint64_t>(2 * i + 1));
    }
    mixer_ = MakeMixer({.spec = spec_, .recompute = recompute, .params = params_});
  }

  double Forward(Keep keep) {
    std::fill_n(y_.ref().data<double>(), y_.ref().elements(), 0.0);
    ModelStep step{.geometry = geometry_};
    ANNULUS_CHECK_OK(mixer_->Forward(ctx_, step, x_.ref(), keep, y_.ref()));
    double sum = 0;
    for (int64_t i = 0; i < y_.ref().elements(); ++i) {
      sum += y_.ref().data<double>()[i] * weights_.ref().data<double>()[i];
    }
    return sum;
  }
  void Backward() {
    ModelStep step{.geometry = geometry_};
    std::fill_n(dx_.ref().data<double>(), dx_.ref().elements(), 1e6);  // overwritten
    ANNULUS_CHECK_OK(mixer_->Backward(ctx_, step, x_.ref(), weights_.ref(), dx_.ref()));
  }

  TensorRef x() { return x_.ref(); }
  TensorRef dx() { return dx_.ref(); }
  ParamStore& params() { return params_; }
  std::string prefix() const { return ParamPrefix(spec_, 0, 0); }

 private:
  static constexpr int64_t kRows = 9, kBatch = 2;
  Shape TokensShape() const { return {kRows * kBatch, spec_.d_model}; }

  ModelSpec spec_;
  Context ctx_{Device{}};
  ParamStore params_;
  AttentionGeometry geometry_;
  Tensor x_, dx_, y_, weights_;
  std::unique_ptr<SequenceMixer> mixer_;
};

void CheckMixer(const ModelSpec& spec) {
  for (const Recompute recompute : kPolicies) {
    SCOPED_TRACE(static_cast<int>(recompute));
    OneMixer one(spec, recompute);
    one.Forward(Keep::kForBackward);
    one.Backward();
    const auto f = [&] { return one.Forward(Keep::kNothing); };
    ExpectSlopes(f, one.x(), one.dx(), 40, "x");
    for (const ParamInfo& info : one.params().table().params) {
      if (!absl::StartsWith(info.name, one.prefix())) continue;
      const int i = one.params().table().IndexOf(info.name);
      ExpectSlopes(f, one.params().Value(i), one.params().Grad(i), 20, info.name);
    }
  }
}

TEST(MixerGradients, Attention) { CheckMixer(SmallSpec({Attention(0)})); }
TEST(MixerGradients, AttentionWithWindowAndWithoutPositions) {
  CheckMixer(SmallSpec({Attention(4, std::nullopt)}));
}
TEST(MixerGradients, Mlp) { CheckMixer(SmallSpec({Mlp()})); }
TEST(MixerGradients, MlpWithoutGate) { CheckMixer(WithReluSquared(SmallSpec({Mlp()}))); }

// The mean loss of a whole model, padding and uncounted tokens included.
void CheckModel(const ModelSpec& spec, Recompute recompute) {
  const WholeBatch batch = RandomBatch(
      spec, {.length = 13, .batch = 2, .lengths = Lengths::kRandom, .documents = Documents::kRandom});
  OnMesh(spec, batch, {.recompute = recompute}, [&](RankModel& model) {
    model.LossAndGradients();
    for (const ParamInfo& info : model.params().table().params) {
      const int i = model.params().table().IndexOf(info.name);
      ExpectSlopes([&] { return model.Loss(); }, model.params().Value(i), model.params().Grad(i), 12,
                   info.name);
    }
  });
}

using ModelGradients = OnNamedSpecs;
INSTANTIATE_TEST_SUITE_P(Specs, ModelGradients, ::testing::ValuesIn(NamedSpecs()), NameOfSpec);

TEST_P(ModelGradients, AreSlopes) {
  for (const Recompute recompute : {Recompute::kNone, Recompute::kBlock}) {
    CheckModel(GetParam().spec, recompute);
  }
}

TEST(HeadGradients, TiedHead) {
  ModelSpec spec = SmallSpec({Attention(0), Mlp()});
  spec.tied_head = true;
  CheckModel(spec, Recompute::kAttentionOutput);
}

// Gradients are added to what is there, and a bucket is final when it is said to be.
TEST(Buckets, AreFinalInReverseOrder) {
  ModelSpec spec = SmallSpec({Attention(0), Mlp()});
  spec.tied_head = true;  // the head's gradient belongs to the first bucket
  OnMesh(spec, RandomBatch(spec, {.length = 13}), {}, [](RankModel& model) {
    std::vector<int> order;
    std::vector<std::vector<double>> at_call(static_cast<size_t>(model.params().buckets()));
    const auto done = [&](int bucket) {
      order.push_back(bucket);
      at_call[static_cast<size_t>(bucket)] = Doubles(model.params().BucketGrads(bucket));
      return absl::OkStatus();
    };
    model.LossAndGradients({.needed = {}, .begun = {}, .done = done});
    EXPECT_EQ(order, (std::vector<int>{3, 2, 1, 0}));
    for (int bucket = 0; bucket < model.params().buckets(); ++bucket) {
      EXPECT_EQ(at_call[static_cast<size_t>(bucket)], Doubles(model.params().BucketGrads(bucket))) << bucket;
    }
  });
}

// Buckets of several layers are needed before the first of them, begun before the first gradient of the pass
// backward, and final after its last.
TEST(Buckets, OfSeveralLayersLastForAWholePass) {
  const ModelSpec& spec = NamedSpecOf("tied").spec;
  OnMesh(spec, RandomBatch(spec, {.length = 13}), {}, [&](RankModel& model) {
    const int layers = static_cast<int>(spec.layers.size()), shared = layers + 2;
    ASSERT_EQ(model.params().buckets(), shared + 2);
    std::vector<std::string> calls;
    const auto note = [&](const char* what) {
      return [&calls, what](int bucket) {
        calls.push_back(absl::StrCat(what, bucket));
        return absl::OkStatus();
      };
    };
    const BucketHooks hooks{.needed = note("needed "), .begun = note("begun "), .done = note("done ")};
    model.LossAndGradients(hooks);
    const std::vector<std::string> want = {
        "needed 0", "needed 7", "needed 8", "needed 1", "needed 2", "needed 3", "needed 4",
        "needed 5", "needed 6", "begun 6",  "done 6",   "begun 7",  "begun 8",  "begun 5",
        "done 5",   "begun 4",  "done 4",   "begun 3",  "done 3",   "begun 2",  "done 2",
        "begun 1",  "done 1",   "done 7",   "done 8",   "begun 0",  "done 0"};
    EXPECT_EQ(calls, want);
  });
}

}  // namespace
}  // namespace annulus::testing
