#pragma once

// What naive layers with states have in common (rounded_states.h): the scan, short convolutions, the gated
// norm and the product behind it. What a bf16 model keeps in f32 is not rounded: time steps, decays, states.

#include "annulus/ops/conv1d.h"
#include "annulus/ops/gated_norm.h"
#include "annulus/ops/ssd.h"
#include "annulus/parallel/state_passing.h"
#include "gpu/rounded_ops.h"

namespace annulus::testing {

// The scan of annulus/ops/ssd.h from nothing to the end of the sequence, and back.
class RoundedScan {
 public:
  void Forward(RoundedOps& ops, const Ssd& ssd, TensorRef stored_y, HeadsRef y) {
    ssd_ = ssd;
    const int64_t heads = ssd.x.batch * ssd.x.heads, chunks = SsdChunks(ssd);
    states_ = {.states = ops.New({chunks, heads, ssd.b.dim, ssd.x.dim}), .decays = ops.New({chunks, heads})};
    ANNULUS_CHECK_OK(SsdChunkStates(ops.ctx, ssd, states_, Summary(ops)));
    ANNULUS_CHECK_OK(SsdForward(ops.ctx, ssd, {}, states_, y));
    ops.Stored(stored_y);
  }
  void Backward(RoundedOps& ops, ConstHeadsRef dy, const SsdGradients& out) {
    const TensorRef gradients = ops.New(states_.states.shape());
    ANNULUS_CHECK_OK(SsdBackwardChunkStates(ops.ctx, ssd_, dy, states_, gradients, Summary(ops)));
    ANNULUS_CHECK_OK(SsdBackward(ops.ctx, ssd_, dy, states_, gradients, {}, out));
  }

 private:
  SegmentSummary Summary(RoundedOps& ops) const {
    const int64_t segments = static_cast<int64_t>(ssd_.segments.size()), heads = ssd_.x.batch * ssd_.x.heads;
    return {.transition = ops.New({segments, heads}),
            .state = ops.New({segments, heads, ssd_.b.dim, ssd_.x.dim})};
  }
  Ssd ssd_;
  SsdStates states_;
};

// Short convolutions over adjacent columns, each with its weights.
class RoundedConv {
 public:
  struct Part {
    RoundedOps::Weights w, bias;
  };
  RoundedConv(RoundedOps& ops, std::vector<Part> parts) : ops_(ops), parts_(std::move(parts)) {}

  // y: as many first columns of its rows as x has
  void Forward(TensorRef x, TensorRef y) {
    x_ = x;
    OverParts([&](const Part&, const Conv1d& conv, int64_t begin, int64_t channels) {
      ANNULUS_CHECK_OK(
          Conv1dForward(ops_.ctx, conv, HeadsOf(x, begin, 1, channels), HeadsOf(y, begin, 1, channels)));
    });
    ops_.Stored(y);
  }
  void Backward(TensorRef dy, TensorRef dx) {
    OverParts([&](const Part& part, const Conv1d& conv, int64_t begin, int64_t channels) {
      ANNULUS_CHECK_OK(Conv1dBackward(ops_.ctx, conv, HeadsOf(x_, begin, 1, channels),
                                      HeadsOf(dy, begin, 1, channels),
                                      {.dx = HeadsOf(dx, begin, 1, channels),
                                       .dhalo = ops_.New(conv.halo.shape()),
                                       .dw = part.w.dw,
                                       .dbias = part.bias.dw}));
    });
    ops_.Stored(dx);
  }

 private:
  template <typename Fn>
  void OverParts(Fn&& fn) {
    int64_t begin = 0;
    for (const Part& part : parts_) {
      const int64_t channels = part.w.w.dim(0), width = part.w.w.dim(1) - 1;
      const Conv1d conv{.w = part.w.w,
                        .bias = part.bias.w,
                        .ages = ops_.geometry.Ages(ops_.ctx),
                        .segments = SegmentsOf(ops_.geometry),
                        .halo = ops_.New({1, width, ops_.batch(), channels})};
      fn(part, conv, begin, channels);
      begin += channels;
    }
  }
  RoundedOps& ops_;
  std::vector<Part> parts_;
  TensorRef x_;
};

// The gated norm behind a scan and the product behind that.
class RoundedGatedOutput {
 public:
  RoundedGatedOutput(RoundedOps& ops, const std::string& prefix, Gate kind, int64_t groups)
      : ops_(ops),
        kind_(kind),
        groups_(groups),
        norm_(ops.Of(prefix + "norm.weight")),
        out_(ops.Of(prefix + "out.weight")) {}

  void Forward(TensorRef o, MatrixRef gate, TensorRef y) {
    o_ = o, gate_ = gate;
    gated_ = ops_.New(o.shape());
    ANNULUS_CHECK_OK(GatedNormForward(ops_.ctx, Norm(), gated_));
    ops_.Product(ops_.Stored(gated_), out_.w, Write::kAccumulate, y);
  }
  // The gradient of o.
  TensorRef Backward(TensorRef dy, MatrixRef dgate) {
    const TensorRef dgated = ops_.New(gated_.shape()), d_o = ops_.New(o_.shape());
    ops_.LinearBackward(dy, gated_, out_, Write::kOverwrite, dgated);
    ANNULUS_CHECK_OK(GatedNormBackward(ops_.ctx, Norm(), dgated, d_o, dgate, norm_.dw));
    ops_.Stored(dgate);
    return ops_.Stored(d_o);
  }

 private:
  GatedNorm Norm() const {
    return {
        .x = o_, .gate = gate_, .w = norm_.w, .groups = groups_, .eps = ops_.spec.norm_eps, .kind = kind_};
  }
  RoundedOps& ops_;
  Gate kind_;
  int64_t groups_;
  RoundedOps::Weights norm_, out_;
  TensorRef o_, gated_;
  MatrixRef gate_;
};

}  // namespace annulus::testing
