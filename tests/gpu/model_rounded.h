#pragma once

// What "naive" means for a model in bf16: the decoder of one CPU rank, written out op by op in f64, with
// every tensor that a bf16 model stores rounded to bf16 as it is stored. Inside of ops nothing is rounded:
// sums, softmax, states, logits and gradients of parameters stay in f64. Without rounding it is the model of
// tests/model.
//
//   const Outcome naive = TrainRounded(spec, batch, {.fill = ...}, kToBFloat16);

#include <memory>

#include "annulus/ops/cross_entropy.h"
#include "annulus/ops/embedding.h"
#include "gpu/rounded_attention.h"
#include "gpu/rounded_states.h"

namespace annulus::testing {

class RoundedDecoder {
 public:
  // `model` is of one rank on the CPU in f64; its gradients are written.
  RoundedDecoder(const ModelSpec& spec, RankModel& model, Rounding rounding)
      : spec_(spec), ops_(spec, model, rounding) {
    for (size_t i = 0; i < spec.layers.size(); ++i) {
      Layer& layer = layers_.emplace_back();
      layer.norm = ops_.Of(absl::StrCat("layers.", i, ".norm.weight"));
      for (size_t b = 0; b < spec.layers[i].branches.size(); ++b) layer.branches.push_back(MakeBranch(i, b));
    }
  }

  Outcome Train() {
    const TokenSlice slice = ops_.model.slice();
    const RoundedOps::Weights embed =
        spec_.meta_tokens > 0 ? ops_.Of("embed.weight", "meta.weight") : ops_.Of("embed.weight");
    TensorRef x = ops_.NewColumns(spec_.d_model);
    ANNULUS_CHECK_OK(EmbeddingForward(ops_.ctx, slice.tokens, embed.w, RoundedOps::Tokens(x)));
    for (size_t i = 0; i < layers_.size(); ++i) x = LayerForward(spec_.layers[i].combine, layers_[i], x);

    Outcome outcome;
    const TensorRef gradient = ops_.New(x.shape());
    outcome.loss = HeadForwardBackward(x, slice.targets, gradient);
    for (size_t i = layers_.size(); i-- > 0;) LayerBackward(spec_.layers[i].combine, layers_[i], gradient);
    ANNULUS_CHECK_OK(EmbeddingBackward(ops_.ctx, slice.tokens, RoundedOps::Tokens(gradient), embed.dw));
    const ParamStore& params = ops_.model.params();
    for (size_t i = 0; i < params.table().params.size(); ++i) {
      outcome.gradients[params.table().params[i].name] = Doubles(params.Grad(static_cast<int>(i)));
    }
    return outcome;
  }

 private:
  struct Branch {
    std::unique_ptr<RoundedBranch> inside;
    RoundedOps::Weights norm = {};  // of its output, where branches are averaged
    TensorRef out = {};
  };
  struct Layer {
    RoundedOps::Weights norm;
    std::vector<Branch> branches;
    TensorRef x, normed;
  };

  // Of the layers before `end`, those that mix tokens.
  int64_t Mixing(size_t end) const {
    return std::count_if(spec_.layers.begin(), spec_.layers.begin() + static_cast<std::ptrdiff_t>(end),
                         [](const LayerSpec& layer) {
                           return std::any_of(layer.branches.begin(), layer.branches.end(),
                                              [](const BranchSpec& b) { return MixesTokens(b.kind); });
                         });
  }
  std::unique_ptr<RoundedBranch> MakeInside(size_t layer, size_t branch) {
    const BranchSpec& of = spec_.layers[layer].branches[branch];
    const std::string prefix = ParamPrefix(spec_, layer, branch);
    switch (of.kind) {
      case BranchKind::kAttention:
        return std::make_unique<RoundedAttention>(ops_, of, prefix, layer, &shared_kv_);
      case BranchKind::kLatentAttention:
        return std::make_unique<RoundedLatentAttention>(ops_, of, prefix);
      case BranchKind::kMamba:
        return std::make_unique<RoundedMamba>(ops_, prefix);
      case BranchKind::kLightning:
        return std::make_unique<RoundedLightning>(ops_, prefix, Mixing(layer), Mixing(spec_.layers.size()));
      case BranchKind::kBased:
        return std::make_unique<RoundedBased>(ops_, prefix);
      case BranchKind::kDeltaNet:
        return std::make_unique<RoundedDeltaNet>(ops_, prefix);
      case BranchKind::kMlp:
        return std::make_unique<RoundedMlp>(ops_, prefix);
    }
    return nullptr;
  }
  Branch MakeBranch(size_t layer, size_t branch) {
    Branch made{.inside = MakeInside(layer, branch)};
    if (spec_.layers[layer].combine == Combine::kSum) return made;
    made.norm = ops_.Of(absl::StrCat("layers.", layer, ".combine.",
                                     Name(spec_.layers[layer].branches[branch].kind), ".weight"));
    return made;
  }

  TensorRef LayerForward(Combine combine, Layer& layer, TensorRef x) {
    layer.x = x;
    layer.normed = ops_.Norm(x, layer.norm, spec_.norm_eps);
    const TensorRef y = ops_.Copied(x);
    for (Branch& branch : layer.branches) {
      if (combine == Combine::kSum) {
        branch.inside->Forward(layer.normed, y);
        continue;
      }
      branch.out = ops_.New(y.shape());
      branch.inside->Forward(layer.normed, branch.out);
      const TensorRef added = ops_.Norm(branch.out, branch.norm, spec_.norm_eps);
      ops_.Multiply(Share(layer), added);
      ops_.Add(added, y);
    }
    return y;
  }
  void LayerBackward(Combine combine, Layer& layer, TensorRef gradient) {
    const TensorRef dnormed = ops_.New(layer.x.shape());
    for (Branch& branch : layer.branches) {
      TensorRef dout = gradient;
      if (combine == Combine::kMeanNorm) {
        const TensorRef share = ops_.Copied(gradient);
        ops_.Multiply(Share(layer), share);
        dout = ops_.New(gradient.shape());
        ops_.NormBackward(branch.out, branch.norm, share, spec_.norm_eps, dout);
      }
      branch.inside->Backward(dout, Write::kAccumulate, dnormed);
    }
    ops_.NormBackward(layer.x, layer.norm, dnormed, spec_.norm_eps, gradient);
  }
  static double Share(const Layer& layer) { return 1.0 / static_cast<double>(layer.branches.size()); }

  // The mean loss, and the gradient of the last layer's output.
  double HeadForwardBackward(TensorRef x, ConstTensorRef targets, TensorRef gradient) {
    const RoundedOps::Weights head = ops_.Of(spec_.tied_head ? "embed.weight" : "head.weight"),
                              norm = ops_.Of("final_norm.weight");
    const TensorRef normed = ops_.Norm(x, norm, spec_.norm_eps), dnormed = ops_.New(x.shape()),
                    loss = ops_.New({1});
    const double counted = ops_.model.counted();
    const LinearCrossEntropy args{.x = RoundedOps::Tokens(normed), .w = head.w, .targets = targets};
    ANNULUS_CHECK_OK(LinearCrossEntropyForwardBackward(
        ops_.ctx, args, {.scale = 1 / counted, .dx = RoundedOps::Tokens(dnormed), .dw = head.dw}, loss));
    ops_.NormBackward(x, norm, ops_.Stored(dnormed), spec_.norm_eps, gradient);
    return *loss.data<double>() / counted;
  }

  const ModelSpec& spec_;
  RoundedOps ops_;
  std::map<size_t, RoundedKv> shared_kv_;
  std::vector<Layer> layers_;
};

inline Outcome TrainRounded(const ModelSpec& spec, const WholeBatch& whole, const MeshRun& run,
                            Rounding rounding) {
  Outcome outcome;
  OnMesh(spec, whole, run,
         [&](RankModel& model) { outcome = RoundedDecoder(spec, model, rounding).Train(); });
  return outcome;
}

}  // namespace annulus::testing
