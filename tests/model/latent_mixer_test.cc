// Latent attention with one branch is multi-head latent attention to the bit: against its equations, written
// down one op after the other, without branches, packed latents or an exchange.

#include <gtest/gtest.h>

#include <cmath>

#include "annulus/base/random.h"
#include "annulus/device/transfer.h"
#include "annulus/model/mixer.h"
#include "annulus/ops/latent_kv.h"
#include "annulus/ops/linear.h"
#include "annulus/ops/rms_norm.h"
#include "annulus/ops/rope.h"
#include "model/named_specs.h"

namespace annulus::testing {
namespace {

constexpr int64_t kRows = 19, kBatch = 2, kTokens = kRows * kBatch;
constexpr double kEps = 1e-6, kTheta = 100;

ModelSpec OneLatentLayer() { return WithLatents(7, SmallSpec({Latent(1)})); }

SequenceBatch Sequences() { return {.batch = kBatch, .lengths = {kRows, kRows}, .document_starts = {}}; }

// One layer on one rank, with its inputs and what becomes of them.
template <typename T>
class LatentLayer {
 public:
  LatentLayer()
      : spec_(OneLatentLayer()),
        ctx_(Device{}),
        params_(Device{}, DTypeOf<T>(), BuildParamTable(spec_), 1),
        geometry_(SequenceLayout(LayoutKind::kContiguous, kRows, 1), MakeLoopbackGroup(1)[0]) {
    FillRandom(params_);
    for (int bucket = 0; bucket < params_.buckets(); ++bucket)
      ZeroBytes(params_.BucketGrads(bucket), ctx_.stream());
    geometry_.SetBatch(Sequences());
    x_ = Random("x"), dy_ = Random("dy");
    y_ = New({kTokens, spec_.d_model}), dx_ = New({kTokens, spec_.d_model});
  }

  void Mix() {
    const std::unique_ptr<SequenceMixer> mixer = MakeMixer({.spec = spec_, .params = params_});
    ModelStep step{.geometry = geometry_};
    ANNULUS_CHECK_OK(mixer->Forward(ctx_, step, x_, Keep::kForBackward, y_));
    ANNULUS_CHECK_OK(mixer->Backward(ctx_, step, x_, dy_, dx_));
  }

  // The equations of the reference, and their derivatives.
  void Compute() {
    const LatentSpec& l = spec_.latent;
    const int64_t dim = l.nope_dim + l.rope_dim, up = l.nope_dim + l.v_dim;
    const RopeFrequencies rope = MakeRopeFrequencies(kTheta, l.rope_dim);
    const TensorRef c_q = New({kTokens, l.q_rank}), c = New({kTokens, l.kv_rank});
    const TensorRef c_q_normed = New(c_q.shape()), c_normed = New(c.shape());
    const TensorRef k_rope = New({kTokens, l.rope_dim}), expanded = New({kTokens, l.heads * up});
    const TensorRef q = New({kRows, kBatch, l.heads * dim}), o = New({kRows, kBatch, l.heads * l.v_dim});
    const TensorRef kv = New({kRows, kBatch, l.heads * (dim + l.v_dim)}), lse = New({kRows, kBatch, l.heads});
    Linear(x_, "q_down", c_q), Linear(x_, "kv_down", c), Linear(x_, "k_rope", k_rope);
    const auto turn = [&](const TensorRef& x, int64_t heads, RopeDirection direction) {
      const int64_t columns = x.elements() / kTokens;
      const TensorRef rows = x.Reshaped({kRows, kBatch, columns});
      ANNULUS_CHECK_OK(Rope(ctx_, geometry_.Positions(ctx_), rope, direction,
                            HeadsOf(rows, 0, heads, columns / heads), columns / heads - l.rope_dim));
    };
    turn(k_rope, 1, RopeDirection::kForward);
    ANNULUS_CHECK_OK(RmsNormForward(ctx_, c_q, W("q_norm"), kEps, c_q_normed));
    ANNULUS_CHECK_OK(RmsNormForward(ctx_, c, W("kv_norm"), kEps, c_normed));
    Linear(c_q_normed, "q_up", q), Linear(c_normed, "kv_up.0", expanded);
    turn(q, l.heads, RopeDirection::kForward);
    const LatentHeads heads{.heads = l.heads, .nope = l.nope_dim, .rope = l.rope_dim, .v = l.v_dim};
    ANNULUS_CHECK_OK(PackLatentKv(ctx_, heads, expanded, k_rope, kv));
    const ContextAttentionShape shape{.heads = l.heads,
                                      .kv_heads = l.heads,
                                      .head_dim = dim,
                                      .v_head_dim = l.v_dim,
                                      .scale = 1 / std::sqrt(static_cast<double>(dim))};
    ExchangeStats stats;
    ANNULUS_CHECK_OK(
        ContextAttentionForward(ctx_, geometry_, shape, {.q = q, .kv = kv, .out = o, .lse = lse}, &stats));
    ANNULUS_CHECK_OK(LinearForward(ctx_, o, W("o"), Write::kAccumulate, y_));

    const TensorRef d_o = New(o.shape()), dq = New(q.shape()), dkv = New(kv.shape());
    const TensorRef dexpanded = New(expanded.shape()), dk_rope = New(k_rope.shape());
    Backward(dy_, "o", o, d_o);
    ANNULUS_CHECK_OK(ContextAttentionBackward(
        ctx_, geometry_, shape, {.q = q, .kv = kv, .out = o, .lse = lse, .dout = d_o, .dq = dq, .dkv = dkv},
        &stats));
    ANNULUS_CHECK_OK(UnpackLatentKvGradient(ctx_, heads, dkv, dexpanded, Write::kOverwrite, dk_rope));
    turn(dq, l.heads, RopeDirection::kGradient), turn(dk_rope, 1, RopeDirection::kGradient);
    const TensorRef dc_normed = New(c.shape()), dc_q_normed = New(c_q.shape());
    const TensorRef dc = New(c.shape()), dc_q = New(c_q.shape());
    Backward(dexpanded, "kv_up.0", c_normed, dc_normed), Backward(dq, "q_up", c_q_normed, dc_q_normed);
    ANNULUS_CHECK_OK(RmsNormBackward(ctx_, c_q, W("q_norm"), dc_q_normed, kEps, dc_q, Grad("q_norm")));
    ANNULUS_CHECK_OK(RmsNormBackward(ctx_, c, W("kv_norm"), dc_normed, kEps, dc, Grad("kv_norm")));
    Backward(dk_rope, "k_rope", x_, dx_);
    Backward(dc_q, "q_down", x_, dx_, Write::kAccumulate),
        Backward(dc, "kv_down", x_, dx_, Write::kAccumulate);
  }

  // Output, gradient of the input and of every parameter.
  std::vector<std::vector<double>> Results() {
    std::vector<std::vector<double>> results = {Doubles(y_), Doubles(dx_)};
    for (size_t i = 0; i < params_.table().params.size(); ++i)
      results.push_back(Doubles(params_.Grad(static_cast<int>(i))));
    return results;
  }

 private:
  TensorRef New(const Shape& shape) {
    const TensorRef tensor = ctx_.saved.Allocate(DTypeOf<T>(), shape);
    ZeroBytes(tensor, ctx_.stream());
    return tensor;
  }
  TensorRef Random(const char* stream) {
    const TensorRef tensor = New({kTokens, spec_.d_model});
    const RandomStream random(4, stream);
    for (int64_t i = 0; i < tensor.elements(); ++i)
      tensor.data<T>()[i] = static_cast<T>(random.Normal(static_cast<uint64_t>(i)));
    return tensor;
  }
  int IndexOf(const char* name) const {
    return params_.table().IndexOf(absl::StrCat(ParamPrefix(spec_, 0, 0), name, ".weight"));
  }
  TensorRef W(const char* name) const { return params_.Value(IndexOf(name)); }
  TensorRef Grad(const char* name) const { return params_.Grad(IndexOf(name)); }
  void Linear(ConstTensorRef x, const char* w, TensorRef y) {
    ANNULUS_CHECK_OK(LinearForward(ctx_, x, W(w), Write::kOverwrite, y));
  }
  void Backward(ConstTensorRef dy, const char* w, ConstTensorRef x, TensorRef dx,
                Write write = Write::kOverwrite) {
    ANNULUS_CHECK_OK(LinearBackwardInput(ctx_, dy, W(w), write, dx));
    ANNULUS_CHECK_OK(LinearBackwardWeight(ctx_, dy, x, Grad(w)));
  }

  ModelSpec spec_;
  Context ctx_;
  ParamStore params_;
  AttentionGeometry geometry_;
  TensorRef x_, dy_, y_, dx_;
};

template <typename T>
class OneBranch : public ::testing::Test {};
using HostTypes = ::testing::Types<float, double>;
TYPED_TEST_SUITE(OneBranch, HostTypes);

TYPED_TEST(OneBranch, IsMultiHeadLatentAttentionToTheBit) {
  LatentLayer<TypeParam> mixed, computed;
  mixed.Mix(), computed.Compute();
  const auto got = mixed.Results(), want = computed.Results();
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i], want[i]) << "result " << i;
    if (i < 2) {
      EXPECT_NE(got[i], std::vector<double>(got[i].size())) << "nothing was computed";
    }
  }
}

}  // namespace
}  // namespace annulus::testing
