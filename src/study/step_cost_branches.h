#pragma once

// Operations of single branches of a layer, and what they are made with.

#include <algorithm>
#include <utility>

#include "step_cost_ops.h"

namespace annulus {

// A branch: its forward, and its backward in two parts, between which forward's work is done again.
struct BranchOps {
  std::vector<Op> forward, first, backward;
  bool gathers_x = true;  // of all the group's tokens: once for branches side by side
};

// Mixers by kind: softmax and latent attention and the MLP; those that pass states.
BranchOps AttentionBranch(const OpInputs& inputs, const BranchSpec& branch);
BranchOps StateBranch(const OpInputs& inputs, const BranchSpec& branch);

class OpMaker {
 public:
  explicit OpMaker(const OpInputs& inputs)
      : spec_(inputs.model),
        run_(inputs.run),
        layout_(inputs.layout),
        tp_(inputs.run.tp),
        element_(static_cast<double>(SizeOf(inputs.run.dtype))),
        accum_(static_cast<double>(SizeOf(AccumOf(inputs.run.dtype)))) {}

 protected:
  static double Real(int64_t count) { return static_cast<double>(count); }
  // Of so many columns of each token of this cp rank.
  double Elements(int64_t columns) const { return Real(run_.local_tokens) * Real(columns); }
  double Stream() const { return Elements(spec_.d_model) * element_ / Real(tp_); }  // bytes

  static Op Over(PassKind kind, double bytes, Again again = Again::kNever) {
    return {.kind = OpKind::kPass, .size = bytes, .pass_kind = kind, .again = again};
  }
  static Op OverBack(PassKind kind, double bytes) {
    return {.kind = OpKind::kPass, .size = bytes, .pass_kind = kind, .pass = Pass::kBackward};
  }
  Op Product(double tokens, int64_t out, int64_t in, Again again = Again::kNever) const {
    return {.kind = OpKind::kProduct, .size = 2 * tokens * Real(out) * Real(in), .again = again};
  }
  Op Gradient(double tokens, int64_t out, int64_t in) const {
    return {.kind = OpKind::kGradient, .size = 2 * tokens * Real(out) * Real(in)};
  }
  // Of all tokens of the cp rank.
  Op Linear(int64_t out, int64_t in, Again again = Again::kNever) const {
    return Product(Elements(1), out, in, again);
  }
  Op LinearGradient(int64_t out, int64_t in) const { return Gradient(Elements(1), out, in); }
  Op Scan(ScanKernel kernel, Pass pass, int64_t elements, Again again = Again::kNever) const {
    return {.kind = OpKind::kScan, .size = Elements(elements), .scan = kernel, .pass = pass, .again = again};
  }
  static Op Attend(const BranchSpec& branch, Pass pass, double times, Again again = Again::kNever) {
    return {
        .kind = OpKind::kAttention,
        .times = times,
        .pass = pass,
        .attention = {.branch = branch.kind, .window = branch.window, .latent_groups = branch.latent_groups},
        .again = again};
  }
  // Of a ring over the tp group, `bytes` on all its ranks together.
  Op Transfer(OpKind kind, double bytes) const {
    return {.kind = kind, .size = bytes / Real(tp_) * Real(tp_ - 1)};
  }
  Op Gather(int64_t columns) const { return Transfer(OpKind::kTensorGather, Elements(columns) * element_); }
  Op Scatter() const { return Transfer(OpKind::kTensorScatter, Elements(spec_.d_model) * element_); }

  Op Norm(Again again) const { return Over(PassKind::kNorm, 2 * Stream(), again); }
  Op NormBackward() const { return OverBack(PassKind::kNorm, 4 * Stream()); }

  // The sum of gradients of x, under way while those of weights are computed.
  void AddInputGradients(const std::vector<std::pair<int64_t, int64_t>>& products, BranchOps* ops) const {
    for (const auto& [out, in] : products) ops->backward.push_back(LinearGradient(out, in));
    if (tp_ > 1) {
      ops->backward.push_back(Scatter());
      ops->backward.back().overlaps_next = true;
    }
    for (const auto& [out, in] : products) ops->backward.push_back(LinearGradient(out, in));
  }

  const ModelSpec& spec_;
  const MemoryInputs& run_;
  const SequenceLayout& layout_;
  int64_t tp_;
  double element_, accum_;  // bytes
};

}  // namespace annulus
