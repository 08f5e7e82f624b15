#pragma once

// Naive attention, latent attention and MLP for model_rounded.h.

#include "annulus/ops/columns.h"
#include "annulus/ops/latent_kv.h"
#include "annulus/ops/relu_squared.h"
#include "annulus/ops/rope.h"
#include "annulus/ops/swiglu.h"
#include "gpu/rounded_ops.h"

namespace annulus::testing {

class RoundedMlp : public RoundedBranch {
 public:
  RoundedMlp(RoundedOps& ops, const std::string& prefix)
      : ops_(ops),
        gated_(ops.spec.activation == Activation::kSwiglu),
        in_(ops.Of(prefix + (gated_ ? "gate.weight" : "up.weight"), prefix + "up.weight")),
        down_(ops.Of(prefix + "down.weight")) {}

  void Forward(TensorRef x, TensorRef y) override {
    x_ = x;
    products_ = ops_.Linear(x, in_);
    h_ = ops_.NewColumns(ops_.spec.d_ff);
    const TensorRef in = RoundedOps::Tokens(products_), h = RoundedOps::Tokens(h_);
    ANNULUS_CHECK_OK(gated_ ? SwigluForward(ops_.ctx, in, h) : ReluSquaredForward(ops_.ctx, in, h));
    ops_.Product(ops_.Stored(h_), down_.w, Write::kAccumulate, y);
  }
  void Backward(TensorRef dy, Write write, TensorRef dx) override {
    const TensorRef dh = ops_.New(h_.shape()), dproducts = ops_.New(products_.shape());
    ops_.LinearBackward(dy, h_, down_, Write::kOverwrite, dh);
    const TensorRef in = RoundedOps::Tokens(products_), dtokens = RoundedOps::Tokens(dh);
    const TensorRef din = RoundedOps::Tokens(dproducts);
    ANNULUS_CHECK_OK(gated_ ? SwigluBackward(ops_.ctx, in, dtokens, din)
                            : ReluSquaredBackward(ops_.ctx, in, dtokens, din));
    ops_.LinearBackward(ops_.Stored(dproducts), x_, in_, write, dx);
  }

 private:
  RoundedOps& ops_;
  bool gated_;
  RoundedOps::Weights in_, down_;
  TensorRef x_, products_, h_;
};

// Softmax attention of one rank with the keys and values that it is given.
class RoundedSoftmax {
 public:
  RoundedSoftmax(RoundedOps& ops, const ContextAttentionShape& shape) : ops_(ops), shape_(shape) {}

  TensorRef Forward(TensorRef q, TensorRef kv) {
    q_ = q, kv_ = kv;
    out_ = ops_.NewColumns(shape_.heads * shape_.v_head_dim);
    lse_ = ops_.NewColumns(shape_.heads);
    ExchangeStats stats;
    ANNULUS_CHECK_OK(ContextAttentionForward(ops_.ctx, ops_.geometry, shape_,
                                             {.q = q, .kv = kv, .out = out_, .lse = lse_}, &stats));
    return ops_.Stored(out_);
  }
  struct Gradients {
    TensorRef dq, dkv;
  };
  Gradients Backward(TensorRef dout) {
    const Gradients to{ops_.New(q_.shape()), ops_.New(kv_.shape())};
    ExchangeStats stats;
    ANNULUS_CHECK_OK(ContextAttentionBackward(
        ops_.ctx, ops_.geometry, shape_,
        {.q = q_, .kv = kv_, .out = out_, .lse = lse_, .dout = dout, .dq = to.dq, .dkv = to.dkv}, &stats));
    ops_.Stored(to.dq), ops_.Stored(to.dkv);
    return to;
  }

 private:
  RoundedOps& ops_;
  ContextAttentionShape shape_;
  TensorRef q_, kv_, out_, lse_;
};

// Turns the last `dim` elements of each head.
inline void RotateRounded(RoundedOps& ops, const BranchSpec& branch, int64_t dim, RopeDirection direction,
                          const HeadsRef& x, TensorRef stored) {
  if (!branch.rope_theta.has_value()) return;
  ANNULUS_CHECK_OK(Rope(ops.ctx, ops.geometry.Positions(ops.ctx),
                        MakeRopeFrequencies(*branch.rope_theta, dim), direction, x, x.dim - dim));
  ops.Stored(stored);
}

// Keys and values that later layers attend to as well, and the sum of their gradients, which is not rounded.
struct RoundedKv {
  TensorRef kv, dkv;
};

class RoundedAttention : public RoundedBranch {
 public:
  // shared: of the layers that others take from; by layer
  RoundedAttention(RoundedOps& ops, const BranchSpec& branch, const std::string& prefix, size_t layer,
                   std::map<size_t, RoundedKv>* shared)
      : ops_(ops),
        branch_(branch),
        layer_(layer),
        shared_(*shared),
        q_(ops.Of(prefix + "q.weight")),
        o_(ops.Of(prefix + "o.weight")),
        softmax_(ops, ShapeOf(ops.spec, branch)) {
    if (!takes()) kv_ = ops.Of(prefix + "k.weight", prefix + "v.weight");
  }

  void Forward(TensorRef x, TensorRef y) override {
    x_ = x;
    const TensorRef q = ops_.Linear(x, q_);
    Rotate(RopeDirection::kForward, q, ops_.spec.heads);
    if (!takes()) {
      const TensorRef kv = ops_.Linear(x, kv_);
      Rotate(RopeDirection::kForward, kv, ops_.spec.kv_heads);
      shared_[layer_] = {kv, ops_.New(kv.shape())};
    }
    out_ = softmax_.Forward(q, Shared().kv);
    ops_.Product(out_, o_.w, Write::kAccumulate, y);
  }
  void Backward(TensorRef dy, Write write, TensorRef dx) override {
    const TensorRef dout = ops_.New(out_.shape());
    ops_.LinearBackward(dy, out_, o_, Write::kOverwrite, dout);
    const RoundedSoftmax::Gradients gradients = softmax_.Backward(dout);
    Rotate(RopeDirection::kGradient, gradients.dq, ops_.spec.heads);
    ops_.LinearBackward(gradients.dq, x_, q_, write, dx);
    ANNULUS_CHECK_OK(AddInPlace(ops_.ctx, gradients.dkv, Shared().dkv));
    if (takes()) return;
    const TensorRef dkv = ops_.Stored(Shared().dkv);
    Rotate(RopeDirection::kGradient, dkv, ops_.spec.kv_heads);
    ops_.LinearBackward(dkv, x_, kv_, Write::kAccumulate, dx);
  }

 private:
  static ContextAttentionShape ShapeOf(const ModelSpec& spec, const BranchSpec& branch) {
    return {.heads = spec.heads,
            .kv_heads = spec.kv_heads,
            .head_dim = spec.head_dim,
            .v_head_dim = spec.head_dim,
            .window = branch.window,
            .scale = 1.0 / std::sqrt(static_cast<double>(spec.head_dim))};
  }
  bool takes() const { return branch_.kv_layers_back > 0; }
  RoundedKv& Shared() { return shared_.at(layer_ - static_cast<size_t>(branch_.kv_layers_back)); }
  void Rotate(RopeDirection direction, TensorRef x, int64_t heads) {
    const int64_t dim = ops_.spec.head_dim, turned = ops_.spec.rotary_dim > 0 ? ops_.spec.rotary_dim : dim;
    RotateRounded(ops_, branch_, turned, direction, HeadsOf(x, 0, heads, dim), x);
  }

  RoundedOps& ops_;
  const BranchSpec& branch_;
  size_t layer_;
  std::map<size_t, RoundedKv>& shared_;
  RoundedOps::Weights q_, o_, kv_;
  RoundedSoftmax softmax_;
  TensorRef x_, out_;
};

// Multi-head latent attention, g branches of which are averaged.
class RoundedLatentAttention : public RoundedBranch {
 public:
  RoundedLatentAttention(RoundedOps& ops, const BranchSpec& branch, const std::string& prefix)
      : ops_(ops),
        branch_(branch),
        latent_(ops.spec.latent),
        heads_{latent_.heads, latent_.nope_dim, latent_.rope_dim, latent_.v_dim},
        q_up_(ops.Of(prefix + "q_up.weight")),
        k_rope_(ops.Of(prefix + "k_rope.weight")),
        o_(ops.Of(prefix + "o.weight")) {
    if (latent_.q_rank > 0) c_q_ = {ops.Of(prefix + "q_down.weight"), ops.Of(prefix + "q_norm.weight")};
    const RoundedOps::Weights down = ops.Of(prefix + "kv_down.weight"),
                              norm = ops.Of(prefix + "kv_norm.weight");
    const int64_t groups = branch.latent_groups, width = latent_.kv_rank / groups;
    for (int64_t b = 0; b < groups; ++b) {
      const auto own = [&](const RoundedOps::Weights& all) {
        return RoundedOps::Weights{all.w.Rows(b * width, (b + 1) * width),
                                   all.dw.Rows(b * width, (b + 1) * width)};
      };
      groups_.push_back({.c = {own(down), own(norm)},
                         .kv_up = ops.Of(absl::StrCat(prefix, "kv_up.", b, ".weight")),
                         .softmax = RoundedSoftmax(ops, Shape())});
    }
  }

  void Forward(TensorRef x, TensorRef y) override {
    x_ = x;
    q_input_ = latent_.q_rank > 0 ? Compress(&c_q_) : x;
    const TensorRef q = ops_.Linear(q_input_, q_up_);
    Rotate(RopeDirection::kForward, q, latent_.heads);
    const TensorRef r = ops_.Linear(x, k_rope_);
    Rotate(RopeDirection::kForward, r, 1);
    for (size_t b = 0; b < groups_.size(); ++b) {
      Group& group = groups_[b];
      const TensorRef up = ops_.Linear(Compress(&group.c), group.kv_up),
                      kv = ops_.NewColumns(heads_.kv_columns());
      ANNULUS_CHECK_OK(PackLatentKv(ops_.ctx, heads_, up, r, kv));
      const TensorRef out = group.softmax.Forward(q, kv);
      if (b == 0) mean_ = groups_.size() > 1 ? ops_.Copied(out) : out;
      if (b > 0) ops_.Add(out, mean_);
    }
    if (groups_.size() > 1) ops_.Multiply(1.0 / static_cast<double>(groups_.size()), mean_);
    ops_.Product(mean_, o_.w, Write::kAccumulate, y);
  }

  void Backward(TensorRef dy, Write write, TensorRef dx) override {
    const TensorRef dmean = ops_.New(mean_.shape());
    ops_.LinearBackward(dy, mean_, o_, Write::kOverwrite, dmean);
    if (groups_.size() > 1) ops_.Multiply(1.0 / static_cast<double>(groups_.size()), dmean);
    const TensorRef dr = ops_.NewColumns(latent_.rope_dim);  // summed in f32
    TensorRef dq;
    for (size_t b = 0; b < groups_.size(); ++b) {
      Group& group = groups_[b];
      const RoundedSoftmax::Gradients gradients = group.softmax.Backward(dmean);
      if (b == 0) dq = gradients.dq;
      if (b > 0) ops_.Add(gradients.dq, dq);
      const TensorRef dup = ops_.NewColumns(heads_.up_columns());
      ANNULUS_CHECK_OK(UnpackLatentKvGradient(ops_.ctx, heads_, gradients.dkv, dup, Write::kAccumulate, dr));
      group.c.dc = ops_.New(group.c.c.shape());
      ops_.LinearBackward(dup, group.c.c, group.kv_up, Write::kOverwrite, group.c.dc);
    }
    Rotate(RopeDirection::kGradient, dq, latent_.heads);
    if (latent_.q_rank > 0) {
      c_q_.dc = ops_.New(c_q_.c.shape());
      ops_.LinearBackward(dq, c_q_.c, q_up_, Write::kOverwrite, c_q_.dc);
    } else {
      ops_.LinearBackward(dq, x_, q_up_, write, dx);
      write = Write::kAccumulate;
    }
    ops_.Stored(dr);
    Rotate(RopeDirection::kGradient, dr, 1);
    ops_.LinearBackward(dr, x_, k_rope_, write, dx);
    if (latent_.q_rank > 0) CompressBackward(c_q_, dx);
    for (const Group& group : groups_) CompressBackward(group.c, dx);
  }

 private:
  static constexpr double kEps = 1e-6;
  // c = RMS(down x)
  struct Compressed {
    RoundedOps::Weights down, norm;
    TensorRef product = {}, c = {}, dc = {};
  };
  struct Group {
    Compressed c;
    RoundedOps::Weights kv_up;
    RoundedSoftmax softmax;
  };

  ContextAttentionShape Shape() const {
    return {.heads = heads_.heads,
            .kv_heads = heads_.heads,
            .head_dim = heads_.k_dim(),
            .v_head_dim = heads_.v,
            .window = branch_.window,
            .scale = 1 / std::sqrt(static_cast<double>(heads_.k_dim()))};
  }
  TensorRef Compress(Compressed* of) {
    of->product = ops_.Linear(x_, of->down);
    of->c = ops_.Norm(of->product, of->norm, kEps);
    return of->c;
  }
  void CompressBackward(const Compressed& of, TensorRef dx) {
    const TensorRef dproduct = ops_.New(of.product.shape());
    ops_.NormBackward(of.product, of.norm, of.dc, kEps, dproduct);
    ops_.LinearBackward(dproduct, x_, of.down, Write::kAccumulate, dx);
  }
  void Rotate(RopeDirection direction, TensorRef x, int64_t heads) {
    RotateRounded(ops_, branch_, latent_.rope_dim, direction, HeadsOf(x, 0, heads, x.dim(2) / heads), x);
  }

  RoundedOps& ops_;
  const BranchSpec& branch_;
  const LatentSpec& latent_;
  LatentHeads heads_;
  RoundedOps::Weights q_up_, k_rope_, o_;
  Compressed c_q_;
  std::vector<Group> groups_;
  TensorRef x_, q_input_, mean_;
};

}  // namespace annulus::testing
