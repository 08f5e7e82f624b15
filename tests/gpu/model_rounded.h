#pragma once

// What "naive" means for a model of attention and MLPs in bf16: the decoder of one CPU rank, written out op
// by op in f64, with every tensor that a bf16 model stores rounded to bf16 as it is stored. Inside of ops
// nothing is rounded: sums, softmax, logits and gradients of parameters stay in f64. Without rounding it is
// the model of tests/model.
//
//   const Outcome naive = TrainRounded(spec, batch, {.fill = ...}, Rounding::kBFloat16);

#include <deque>

#include "annulus/ops/cross_entropy.h"
#include "annulus/ops/elementwise.h"
#include "annulus/ops/embedding.h"
#include "annulus/ops/linear.h"
#include "annulus/ops/rms_norm.h"
#include "annulus/ops/rope.h"
#include "annulus/ops/swiglu.h"
#include "model/mesh_run.h"

namespace annulus::testing {

enum class Rounding { kNone, kBFloat16 };

class RoundedDecoder {
 public:
  // `model` is of one rank on the CPU in f64; its gradients are written.
  RoundedDecoder(const ModelSpec& spec, RankModel& model, Rounding rounding)
      : spec_(spec), model_(model), ctx_(model.ctx()), params_(model.params()), rounding_(rounding) {}

  Outcome Train() {
    const TokenSlice slice = model_.slice();
    const int64_t rows = model_.geometry().layout().local_rows(), batch = model_.geometry().sequences().batch;
    TensorRef x = New({rows, batch, spec_.d_model});
    ANNULUS_CHECK_OK(EmbeddingForward(ctx_, slice.tokens, Of("embed.weight").w, Tokens(x)));
    std::vector<Layer> layers(spec_.layers.size());
    for (size_t i = 0; i < layers.size(); ++i) {
      layers[i].x = x;
      layers[i].normed = Norm(x, Of(Prefix(i) + "norm.weight"));
      x = IsAttention(i) ? AttentionForward(i, layers[i]) : MlpForward(i, layers[i]);
    }

    Outcome outcome;
    TensorRef gradient = New(x.shape());
    outcome.loss = HeadForwardBackward(x, slice.targets, gradient);
    for (size_t i = layers.size(); i-- > 0;) {
      const TensorRef dnormed =
          IsAttention(i) ? AttentionBackward(i, layers[i], gradient) : MlpBackward(i, layers[i], gradient);
      NormBackward(layers[i].x, Of(Prefix(i) + "norm.weight"), dnormed, gradient);
    }
    ANNULUS_CHECK_OK(EmbeddingBackward(ctx_, slice.tokens, Tokens(gradient), Of("embed.weight").dw));
    for (size_t i = 0; i < params_.table().params.size(); ++i) {
      outcome.gradients[params_.table().params[i].name] = Doubles(params_.Grad(static_cast<int>(i)));
    }
    return outcome;
  }

 private:
  struct Weights {
    TensorRef w, dw;
  };
  struct Layer {
    TensorRef x, normed;
    TensorRef q, kv, out, lse;  // of attention
    TensorRef gate_up, h;       // of an MLP
  };

  static std::string Prefix(size_t layer) { return absl::StrCat("layers.", layer, "."); }
  static TensorRef Tokens(TensorRef t) { return t.Reshaped({t.dim(0) * t.dim(1), t.dim(2)}); }
  const BranchSpec& BranchOf(size_t layer) const { return spec_.layers[layer].branches[0]; }
  bool IsAttention(size_t layer) const { return BranchOf(layer).kind == BranchKind::kAttention; }
  // A parameter, or adjacent ones as one matrix, as the model has them.
  Weights Of(const std::string& first, const std::string& last) const {
    const int begin = params_.table().IndexOf(first), end = params_.table().IndexOf(last);
    return {params_.Values(begin, end), params_.Grads(begin, end)};
  }
  Weights Of(const std::string& name) const { return Of(name, name); }
  TensorRef New(Shape shape) { return tensors_.emplace_back(Device{}, DType::kF64, shape).ref(); }
  TensorRef Stored(TensorRef t) const {
    if (rounding_ == Rounding::kNone) return t;
    double* values = t.data<double>();
    for (int64_t i = 0; i < t.elements(); ++i) values[i] = ToFloat(ToBFloat16(static_cast<float>(values[i])));
    return t;
  }

  TensorRef Norm(TensorRef x, const Weights& weights) {
    const TensorRef y = New(x.shape());
    ANNULUS_CHECK_OK(RmsNormForward(ctx_, Tokens(x), weights.w, spec_.norm_eps, Tokens(y)));
    return Stored(y);
  }
  void NormBackward(TensorRef x, const Weights& weights, TensorRef dy, TensorRef gradient) {
    ANNULUS_CHECK_OK(RmsNormBackward(ctx_, Tokens(x), weights.w, Tokens(dy), spec_.norm_eps, Tokens(gradient),
                                     weights.dw));
    Stored(gradient);
  }
  TensorRef Linear(TensorRef x, const Weights& weights) {
    const TensorRef y = New({x.dim(0), x.dim(1), weights.w.dim(0)});
    ANNULUS_CHECK_OK(LinearForward(ctx_, x, weights.w, Write::kOverwrite, y));
    return Stored(y);
  }
  // x + h w^T
  TensorRef AddBranch(TensorRef x, TensorRef h, const Weights& weights) {
    const TensorRef y = New(x.shape());
    ANNULUS_CHECK_OK(Copy(ctx_, x, y));
    ANNULUS_CHECK_OK(LinearForward(ctx_, h, weights.w, Write::kAccumulate, y));
    return Stored(y);
  }
  // dx (=, +=) the gradient of the product's input; the weights' gradient is added.
  void LinearBackward(TensorRef dy, TensorRef x, const Weights& weights, Write write, TensorRef dx) {
    ANNULUS_CHECK_OK(LinearBackwardInput(ctx_, dy, weights.w, write, dx));
    ANNULUS_CHECK_OK(LinearBackwardWeight(ctx_, dy, x, weights.dw));
    Stored(dx);
  }

  ContextAttentionShape AttentionShape(size_t layer) const {
    return {.heads = spec_.heads,
            .kv_heads = spec_.kv_heads,
            .head_dim = spec_.head_dim,
            .v_head_dim = spec_.head_dim,
            .window = BranchOf(layer).window,
            .scale = 1.0 / std::sqrt(static_cast<double>(spec_.head_dim))};
  }
  void Rotate(size_t layer, RopeDirection direction, TensorRef q, TensorRef kv) {
    const std::optional<double> theta = BranchOf(layer).rope_theta;
    if (!theta.has_value()) return;
    const ConstTensorRef positions = model_.geometry().Positions(ctx_);
    const auto rotate = [&](TensorRef x, int64_t heads) {
      ANNULUS_CHECK_OK(Rope(ctx_, positions, MakeRopeFrequencies(*theta, spec_.head_dim), direction,
                            HeadsOf(x, 0, heads, spec_.head_dim)));
      Stored(x);
    };
    rotate(q, spec_.heads);
    rotate(kv, spec_.kv_heads);
  }

  TensorRef AttentionForward(size_t i, Layer& layer) {
    const std::string prefix = Prefix(i) + "attention.";
    layer.q = Linear(layer.normed, Of(prefix + "q.weight"));
    layer.kv = Linear(layer.normed, Of(prefix + "k.weight", prefix + "v.weight"));
    Rotate(i, RopeDirection::kForward, layer.q, layer.kv);
    layer.out = New(layer.q.shape());
    layer.lse = New({layer.q.dim(0), layer.q.dim(1), spec_.heads});
    ExchangeStats stats;
    ANNULUS_CHECK_OK(
        ContextAttentionForward(ctx_, model_.geometry(), AttentionShape(i),
                                {.q = layer.q, .kv = layer.kv, .out = layer.out, .lse = layer.lse}, &stats));
    return AddBranch(layer.x, Stored(layer.out), Of(prefix + "o.weight"));
  }
  // The gradient of layer.normed.
  TensorRef AttentionBackward(size_t i, const Layer& layer, TensorRef dy) {
    const std::string prefix = Prefix(i) + "attention.";
    const TensorRef dout = New(layer.out.shape()), dq = New(layer.q.shape()), dkv = New(layer.kv.shape());
    LinearBackward(dy, layer.out, Of(prefix + "o.weight"), Write::kOverwrite, dout);
    ExchangeStats stats;
    ANNULUS_CHECK_OK(ContextAttentionBackward(ctx_, model_.geometry(), AttentionShape(i),
                                              {.q = layer.q,
                                               .kv = layer.kv,
                                               .out = layer.out,
                                               .lse = layer.lse,
                                               .dout = dout,
                                               .dq = dq,
                                               .dkv = dkv},
                                              &stats));
    Stored(dq), Stored(dkv);
    Rotate(i, RopeDirection::kGradient, dq, dkv);
    const TensorRef dx = New(layer.normed.shape());
    LinearBackward(dq, layer.normed, Of(prefix + "q.weight"), Write::kOverwrite, dx);
    LinearBackward(dkv, layer.normed, Of(prefix + "k.weight", prefix + "v.weight"), Write::kAccumulate, dx);
    return dx;
  }

  TensorRef MlpForward(size_t i, Layer& layer) {
    const std::string prefix = Prefix(i) + "mlp.";
    layer.gate_up = Linear(layer.normed, Of(prefix + "gate.weight", prefix + "up.weight"));
    layer.h = New({layer.x.dim(0), layer.x.dim(1), spec_.d_ff});
    ANNULUS_CHECK_OK(SwigluForward(ctx_, Tokens(layer.gate_up), Tokens(layer.h)));
    return AddBranch(layer.x, Stored(layer.h), Of(prefix + "down.weight"));
  }
  TensorRef MlpBackward(size_t i, const Layer& layer, TensorRef dy) {
    const std::string prefix = Prefix(i) + "mlp.";
    const TensorRef dh = New(layer.h.shape()), dgate_up = New(layer.gate_up.shape());
    LinearBackward(dy, layer.h, Of(prefix + "down.weight"), Write::kOverwrite, dh);
    ANNULUS_CHECK_OK(SwigluBackward(ctx_, Tokens(layer.gate_up), Tokens(dh), Tokens(dgate_up)));
    Stored(dgate_up);
    const TensorRef dx = New(layer.normed.shape());
    LinearBackward(dgate_up, layer.normed, Of(prefix + "gate.weight", prefix + "up.weight"),
                   Write::kOverwrite, dx);
    return dx;
  }

  // The mean loss, and the gradient of the last layer's output.
  double HeadForwardBackward(TensorRef x, ConstTensorRef targets, TensorRef gradient) {
    const Weights head = Of(spec_.tied_head ? "embed.weight" : "head.weight");
    const TensorRef normed = Norm(x, Of("final_norm.weight")), dnormed = New(x.shape()), loss = New({1});
    const LinearCrossEntropy args{.x = Tokens(normed), .w = head.w, .targets = targets};
    ANNULUS_CHECK_OK(LinearCrossEntropyForwardBackward(
        ctx_, args, {.scale = 1 / model_.counted(), .dx = Tokens(dnormed), .dw = head.dw}, loss));
    NormBackward(x, Of("final_norm.weight"), Stored(dnormed), gradient);
    return *loss.data<double>() / model_.counted();
  }

  const ModelSpec& spec_;
  RankModel& model_;
  Context& ctx_;
  ParamStore& params_;
  Rounding rounding_;
  std::deque<Tensor> tensors_;
};

inline Outcome TrainRounded(const ModelSpec& spec, const WholeBatch& whole, const MeshRun& run,
                            Rounding rounding) {
  Outcome outcome;
  OnMesh(spec, whole, run,
         [&](RankModel& model) { outcome = RoundedDecoder(spec, model, rounding).Train(); });
  return outcome;
}

}  // namespace annulus::testing
