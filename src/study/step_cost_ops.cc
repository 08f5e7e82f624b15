#include "step_cost_ops.h"

#include "annulus/ops/cross_entropy.h"
#include "step_cost_branches.h"

namespace annulus {
namespace {

class LayerLister : OpMaker {
 public:
  explicit LayerLister(const OpInputs& inputs) : OpMaker(inputs), inputs_(inputs) {}

  LayerOps Embedding() const {
    const double rows = Elements(1), d = Real(spec_.d_model);
    LayerOps ops;
    ops.forward = {Over(PassKind::kMove, 2 * rows * d * element_)};
    ops.backward = {Over(PassKind::kMove, rows * d * (element_ + 2 * accum_))};
    if (tp_ == 1) return ops;
    ops.forward.push_back(Scatter());
    ops.backward.insert(ops.backward.begin(), Gather(spec_.d_model));
    return ops;
  }

  LayerOps Layer(const LayerSpec& layer) const {
    LayerOps ops;
    AddForward(layer, &ops.forward);
    if (run_.recompute != Recompute::kNone) ops.backward.push_back(Norm(Again::kNever));
    AddBackward(layer, &ops.backward);
    ops.backward.push_back(NormBackward());
    return ops;
  }

  LayerOps Head() const {
    const int64_t vocab = (spec_.vocab_size + tp_ - 1) / tp_, tokens = run_.local_tokens;
    const int64_t chunk =
        std::min(tokens, run_.device == DeviceKind::kCpu ? CpuLossChunkTokens(kLossChunkTokens, vocab)
                                                         : kLossChunkTokens);
    const double chunks = Real(tokens) / Real(chunk);
    const auto each = [&](Op op) {
      op.times = chunks;
      return op;
    };
    const double logits = Real(chunk) * Real(vocab), flops = 2 * logits * Real(spec_.d_model);
    LayerOps ops;
    ops.forward = {Norm(Again::kNever)};
    if (tp_ > 1) ops.forward.push_back(Gather(spec_.d_model));
    ops.forward.push_back(each({.kind = OpKind::kProduct, .size = flops}));
    // The gradient takes the logits' place, in the compute dtype.
    ops.forward.push_back(each(Over(PassKind::kCrossEntropy, logits * (accum_ + element_))));
    if (tp_ > 1) {
      ops.forward.push_back(each(Transfer(OpKind::kTensorGather, 2 * accum_ * Real(chunk * tp_))));
    }
    ops.backward = {each({.kind = OpKind::kGradient, .size = flops}),
                    each({.kind = OpKind::kGradient, .size = flops})};
    if (tp_ > 1) ops.backward.push_back(Scatter());
    ops.backward.push_back(NormBackward());
    return ops;
  }

 private:
  void AddForward(const LayerSpec& layer, std::vector<Op>* ops) const {
    const bool summed = layer.combine == Combine::kSum;
    ops->push_back(Norm(Again::kNever));
    ops->push_back(Over(PassKind::kMove, 2 * Stream()));  // the residual stream of the next layer
    bool gathered = false;
    for (size_t b = 0; b < layer.branches.size(); ++b) {
      if (!summed) ops->push_back(Over(PassKind::kMove, Stream()));
      const BranchOps branch = Branch(layer.branches[b]);
      if (tp_ > 1 && branch.gathers_x && !gathered) {
        ops->push_back(Gather(spec_.d_model));
        gathered = true;
      }
      ops->insert(ops->end(), branch.forward.begin(), branch.forward.end());
      if (tp_ > 1 && (!summed || b + 1 == layer.branches.size())) ops->push_back(Scatter());
      if (summed) continue;
      ops->push_back(Norm(Again::kNever));
      ops->push_back(Over(PassKind::kMove, 2 * Stream()));  // scaled
      ops->push_back(Over(PassKind::kMove, 3 * Stream()));  // added
    }
  }

  void AddBackward(const LayerSpec& layer, std::vector<Op>* ops) const {
    const bool summed = layer.combine == Combine::kSum;
    int64_t to_sum = std::count_if(layer.branches.begin(), layer.branches.end(), SumsInputGradient);
    bool x_gathered = false, dy_gathered = false;
    for (const BranchSpec& spec : layer.branches) {
      if (!summed) {
        ops->push_back(Over(PassKind::kMove, 5 * Stream()));  // a share of dy, and room for the next
        ops->push_back(NormBackward());
      }
      const BranchOps branch = Branch(spec);
      if (tp_ > 1 && (!dy_gathered || !summed)) ops->push_back(Gather(spec_.d_model));
      dy_gathered = true;
      if (tp_ > 1 && branch.gathers_x && !x_gathered) {
        ops->push_back(Gather(spec_.d_model));
        ops->back().overlaps_next = !branch.first.empty();
        x_gathered = true;
      }
      ops->insert(ops->end(), branch.first.begin(), branch.first.end());
      for (Op op : branch.forward) {
        if (!DoneAgain(op.again)) continue;
        op.again = Again::kNever;
        ops->push_back(op);
      }
      const bool sums = SumsInputGradient(spec);
      for (const Op& op : branch.backward) {
        // Branches side by side have one sum: that of the last is scattered.
        if (op.kind == OpKind::kTensorScatter && sums && --to_sum > 0) continue;
        ops->push_back(op);
      }
      if (!sums && layer.branches.size() > 1) ops->push_back(Over(PassKind::kMove, 3 * Stream()));
    }
  }
  static bool SumsInputGradient(const BranchSpec& branch) {
    return branch.kind != BranchKind::kLatentAttention;
  }
  bool DoneAgain(Again again) const {
    switch (again) {
      case Again::kNever:
        return false;
      case Again::kUnlessNone:
        return run_.recompute != Recompute::kNone;
      case Again::kUnlessElementwise:
        return run_.recompute != Recompute::kNone && run_.recompute != Recompute::kElementwise;
      case Again::kWithBlock:
        return run_.recompute == Recompute::kBlock;
    }
    return false;
  }

  BranchOps Branch(const BranchSpec& branch) const {
    return PassesStates(branch.kind) ? StateBranch(inputs_, branch) : AttentionBranch(inputs_, branch);
  }

  const OpInputs& inputs_;
};

}  // namespace

LayerOps EmbeddingOps(const OpInputs& inputs) { return LayerLister(inputs).Embedding(); }
LayerOps OpsOf(const OpInputs& inputs, size_t layer) {
  return LayerLister(inputs).Layer(inputs.model.layers[layer]);
}
LayerOps HeadOps(const OpInputs& inputs) { return LayerLister(inputs).Head(); }

}  // namespace annulus
