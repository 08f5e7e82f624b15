// Operations of softmax attention, latent attention and the MLP, in the order of their mixers.

#include "step_cost_branches.h"

namespace annulus {
namespace {

class AttentionLister : OpMaker {
 public:
  using OpMaker::OpMaker;

  BranchOps Mlp() const {
    const int64_t d = spec_.d_model, inner = spec_.d_ff / tp_;
    const bool gated = spec_.activation == Activation::kSwiglu;
    const int64_t in = gated ? 2 * inner : inner;
    BranchOps ops;
    ops.forward = {Linear(in, d, Again::kUnlessElementwise),
                   Over(PassKind::kActivation, Elements(in + inner) * element_, Again::kUnlessNone),
                   Linear(d, inner)};
    ops.first = {LinearGradient(d, inner)};
    ops.backward = {LinearGradient(d, inner),
                    OverBack(PassKind::kActivation, Elements(2 * in + inner) * element_)};
    AddInputGradients({{in, d}}, &ops);
    return ops;
  }

  BranchOps Attention(const BranchSpec& branch) const {
    const int64_t d = spec_.d_model, q = spec_.heads / tp_ * spec_.head_dim;
    const int64_t k = std::max<int64_t>(1, spec_.kv_heads / tp_) * spec_.head_dim;
    const bool own_kv = branch.kv_layers_back == 0;
    constexpr Again kProjected = Again::kUnlessElementwise;
    BranchOps ops;
    ops.forward = {Linear(q, d, kProjected), Rope(branch, q, kProjected)};
    if (own_kv) {
      ops.forward.push_back(Linear(2 * k, d, kProjected));
      ops.forward.push_back(Rope(branch, k, kProjected));
    }
    ops.forward.push_back(Attend(branch, Pass::kForward, 1, Again::kWithBlock));
    ops.forward.push_back(Linear(d, q));
    ops.first = {LinearGradient(d, q)};
    ops.backward = {LinearGradient(d, q), Attend(branch, Pass::kBackward, 1), Rope(branch, q)};
    if (own_kv) {
      ops.backward.push_back(Rope(branch, k));
      AddInputGradients({{q, d}, {2 * k, d}}, &ops);
    } else {
      ops.backward.push_back(Over(PassKind::kMove, Elements(2 * k) * (element_ + 2 * accum_)));
      AddInputGradients({{q, d}}, &ops);
    }
    return ops;
  }

  BranchOps Latent(const BranchSpec& branch) const {
    const LatentSizes n = SizesOf(branch);
    const int64_t d = spec_.d_model, q_in = spec_.latent.q_rank > 0 ? spec_.latent.q_rank : d;
    BranchOps ops{.forward = {}, .first = {}, .backward = {}, .gathers_x = false};
    AddProjection(branch, n, &ops.forward);
    AddGatheredLatents(n, &ops.forward);
    ops.forward.push_back(Linear(n.own_heads * n.dim, q_in, Again::kUnlessElementwise));
    ops.forward.push_back(Rope(branch, n.own_heads * n.rope, Again::kUnlessElementwise));
    const double q_bytes = Elements(n.heads * n.dim) * element_,
                 out_bytes = Elements(n.heads * n.v) * element_;
    AddHeads(OpKind::kTensorGather, q_bytes, n, &ops.forward, Again::kUnlessElementwise);
    AddLatents(n, Again::kWithBlock, &ops.forward);
    ops.forward.push_back(Attend(branch, Pass::kForward, Real(n.here), Again::kWithBlock));
    if (branch.latent_groups > 1) {
      const double sums = Real(2 + 3 * (n.here - 1)) * out_bytes;
      ops.forward.push_back(Over(PassKind::kMove, sums, Again::kWithBlock));
      AddHeads(OpKind::kTensorScatter, out_bytes, n, &ops.forward, Again::kWithBlock);
      ops.forward.push_back(
          Over(PassKind::kMove, 4 * Elements(n.own_heads * n.v) * element_, Again::kWithBlock));
    }
    ops.forward.push_back(Linear(d, n.own_heads * n.v));
    AddLatentBackward(branch, n, q_in, &ops);
    return ops;
  }

 private:
  Op Rope(const BranchSpec& branch, int64_t columns, Again again = Again::kNever) const {
    return Over(PassKind::kRope, branch.rope_theta.has_value() ? 2 * Elements(columns) * element_ : 0, again);
  }

  struct LatentSizes {
    LatentShard mesh;
    int64_t own_heads, dim, v;    // heads whose queries this rank projects; of a head
    int64_t heads, here;          // heads and branches of the latent that it attends for
    int64_t width, rope, packed;  // columns: of a branch, of the shared key part, of all that is gathered
  };
  LatentSizes SizesOf(const BranchSpec& branch) const {
    const LatentSpec& latent = spec_.latent;
    const LatentShard mesh = LatentShardOf({.rank = 0, .size = static_cast<int>(tp_)}, branch.latent_groups);
    return {.mesh = mesh,
            .own_heads = latent.heads / tp_,
            .dim = latent.nope_dim + latent.rope_dim,
            .v = latent.v_dim,
            .heads = latent.heads / mesh.head_groups,
            .here = branch.latent_groups / mesh.latent_groups,
            .width = latent.kv_rank / branch.latent_groups,
            .rope = latent.rope_dim,
            .packed = latent.q_rank + latent.kv_rank + latent.rope_dim};
  }
  // Columns of products with a norm behind them.
  std::vector<int64_t> NormedParts(const BranchSpec& branch, const LatentSizes& n) const {
    std::vector<int64_t> parts(static_cast<size_t>(branch.latent_groups), n.width);
    if (spec_.latent.q_rank > 0) parts.push_back(spec_.latent.q_rank);
    return parts;
  }
  // Of heads among the ranks of one head group; `bytes` on all of them together.
  void AddHeads(OpKind kind, double bytes, const LatentSizes& n, std::vector<Op>* ops,
                Again again = Again::kNever) const {
    const double ranks = n.mesh.latent_groups;
    if (ranks > 1) ops->push_back({.kind = kind, .size = bytes / ranks * (ranks - 1), .again = again});
  }
  void AddGatheredLatents(const LatentSizes& n, std::vector<Op>* ops) const {
    if (tp_ == 1) return;
    ops->push_back(Gather(n.packed));
    if (spec_.latent.q_rank == 0) ops->push_back(Gather(spec_.d_model));
  }

  // Of this tensor-parallel rank's tokens.
  void AddProjection(const BranchSpec& branch, const LatentSizes& n, std::vector<Op>* ops) const {
    const double tokens = Elements(1) / Real(tp_);
    for (const int64_t columns : NormedParts(branch, n))
      ops->push_back(Product(tokens, columns, spec_.d_model, Again::kUnlessElementwise));
    ops->push_back(Product(tokens, n.rope, spec_.d_model, Again::kUnlessElementwise));
    for (const int64_t columns : NormedParts(branch, n)) {
      const double bytes = 2 * tokens * Real(columns) * element_;
      ops->push_back(Over(PassKind::kNorm, bytes, Again::kUnlessNone));
      ops->push_back(Over(PassKind::kMove, bytes, Again::kUnlessNone));  // into the packed rows
    }
  }
  // A row of latents with the shared key part, of each branch.
  void AddLatents(const LatentSizes& n, Again again, std::vector<Op>* ops) const {
    Op move = Over(PassKind::kMove, 2 * Elements(n.width + n.rope) * element_, again);
    move.times = Real(n.here);
    ops->push_back(move);
  }
  void AddLatentBackward(const BranchSpec& branch, const LatentSizes& n, int64_t q_in, BranchOps* to) const {
    const int64_t d = spec_.d_model, own_q = n.own_heads * n.dim, own_v = n.own_heads * n.v;
    const double q_bytes = Elements(n.heads * n.dim) * element_,
                 out_bytes = Elements(n.heads * n.v) * element_;
    AddGatheredLatents(n, &to->first);
    std::vector<Op>& ops = to->backward;
    ops = {LinearGradient(d, own_v), LinearGradient(d, own_v)};
    if (branch.latent_groups > 1) ops.push_back(Over(PassKind::kMove, 2 * Elements(own_v) * element_));
    AddHeads(OpKind::kTensorGather, out_bytes, n, &ops);
    AddLatents(n, Again::kNever, &ops);
    ops.push_back(Attend(branch, Pass::kBackward, Real(n.here)));
    Op put = Over(PassKind::kMove, 2 * Elements(n.width + n.rope) * accum_);
    put.times = Real(n.here);
    ops.push_back(put);
    if (n.here > 1) ops.push_back(Over(PassKind::kMove, Real(3 * (n.here - 1)) * q_bytes));
    AddHeads(OpKind::kTensorScatter, q_bytes, n, &ops);
    ops.push_back(Rope(branch, n.own_heads * n.rope));
    ops.push_back(LinearGradient(own_q, q_in));
    if (tp_ > 1) {
      const auto under_way = [&ops](Op sum) {
        sum.overlaps_next = true;
        ops.push_back(sum);
      };
      // Queries that are projected from x have a gradient of it besides the latents'.
      if (spec_.latent.q_rank == 0) under_way(Scatter());
      under_way(Transfer(OpKind::kTensorScatter, Elements(n.packed) * accum_));
    }
    ops.push_back(LinearGradient(own_q, q_in));
    const double tokens = Elements(1) / Real(tp_);
    for (const int64_t columns : NormedParts(branch, n)) {
      const double elements = tokens * Real(columns);
      ops.push_back(Over(PassKind::kMove, elements * (accum_ + 2 * element_)));  // taken; zeroed
      ops.push_back(OverBack(PassKind::kNorm, 4 * elements * element_));
      ops.insert(ops.end(), 2, Gradient(tokens, columns, d));
    }
    ops.insert(ops.end(), 2, Gradient(tokens, n.rope, d));
  }
};

}  // namespace

BranchOps AttentionBranch(const OpInputs& inputs, const BranchSpec& branch) {
  const AttentionLister lister(inputs);
  switch (branch.kind) {
    case BranchKind::kAttention:
      return lister.Attention(branch);
    case BranchKind::kLatentAttention:
      return lister.Latent(branch);
    default:
      return lister.Mlp();
  }
}

}  // namespace annulus
