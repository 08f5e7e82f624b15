#include "step_cost_ops.h"

#include <algorithm>

#include "annulus/base/check.h"
#include "annulus/ops/cross_entropy.h"
#include "annulus/ops/taylor_features.h"

namespace annulus {
namespace {

// A branch: its forward, and its backward in two parts, between which forward's work is done again.
struct BranchOps {
  std::vector<Op> forward, first, backward;
  bool gathers_x = true;  // of all the group's tokens: once for branches side by side
};

class Lister {
 public:
  explicit Lister(const OpInputs& inputs)
      : spec_(inputs.model),
        run_(inputs.run),
        layout_(inputs.layout),
        tp_(inputs.run.tp),
        element_(SizeOf(inputs.run.dtype)),
        accum_(SizeOf(AccumOf(inputs.run.dtype))) {}

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
  static double Real(int64_t count) { return static_cast<double>(count); }
  // Elements of so many columns of each token of this cp rank.
  double Elements(int64_t columns) const { return Real(run_.local_tokens) * Real(columns); }
  double Stream() const { return Elements(spec_.d_model) * element_ / Real(tp_); }  // bytes

  // ---- Operations ------------------------------------------------------------------------------------

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

  // ---- Layers ----------------------------------------------------------------------------------------

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

  // The sum of gradients of x, under way while those of weights are computed.
  void AddInputGradients(const std::vector<std::pair<int64_t, int64_t>>& products, BranchOps* ops) const {
    for (const auto& [out, in] : products) ops->backward.push_back(LinearGradient(out, in));
    if (tp_ > 1) {
      ops->backward.push_back(Scatter());
      ops->backward.back().overlaps_next = true;
    }
    for (const auto& [out, in] : products) ops->backward.push_back(LinearGradient(out, in));
  }

  BranchOps Branch(const BranchSpec& branch) const {
    switch (branch.kind) {
      case BranchKind::kAttention:
        return Attention(branch);
      case BranchKind::kLatentAttention:
        return Latent(branch);
      case BranchKind::kMamba:
        return Mamba();
      case BranchKind::kLightning:
        return Lightning();
      case BranchKind::kBased:
        return Based();
      case BranchKind::kDeltaNet:
        return DeltaNet();
      case BranchKind::kMlp:
        return Mlp();
    }
    return {};
  }

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

  Op Rope(const BranchSpec& branch, int64_t columns, Again again = Again::kNever) const {
    return Over(PassKind::kRope, branch.rope_theta.has_value() ? 2 * Elements(columns) * element_ : 0, again);
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

  // ---- Latent attention ------------------------------------------------------------------------------

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
      ops.push_back(Transfer(OpKind::kTensorScatter, Elements(n.packed) * accum_));
      ops.back().overlaps_next = true;
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

  // ---- Layers with states ----------------------------------------------------------------------------

  // Before work that runs while states, or rows before a convolution, travel.
  void AddStates(BranchKind kind, StateOrder order, int64_t StateExchange::* bytes,
                 std::vector<Op>* ops) const {
    if (run_.cp == 1) return;
    const StateExchange sent = StateExchangeOf(
        spec_, kind, order, {.layout = layout_, .sequences = run_.sequences, .tp = tp_, .dtype = run_.dtype});
    if (sent.*bytes == 0) return;
    ops->push_back({.kind = OpKind::kStates, .size = Real(sent.*bytes), .overlaps_next = true});
  }

  BranchOps Mamba() const {
    const MambaSpec& mamba = spec_.mamba;
    constexpr BranchKind kKind = BranchKind::kMamba;
    const int64_t d = spec_.d_model, heads = mamba.heads / tp_, inner = heads * mamba.head_dim;
    const int64_t bcx = inner + 2 * std::max<int64_t>(1, mamba.groups / tp_) * mamba.state;
    const int64_t state = heads * mamba.state * mamba.head_dim;
    BranchOps ops;
    std::vector<Op>& forward = ops.forward;
    AddStates(kKind, StateOrder::kForward, &StateExchange::halo_bytes, &forward);
    forward.push_back(Linear(bcx, d, Again::kUnlessElementwise));
    forward.push_back(Linear(heads, d, Again::kUnlessElementwise));
    forward.push_back(Over(PassKind::kConvolution, 2 * Elements(bcx) * element_, Again::kUnlessNone));
    forward.push_back(
        Over(PassKind::kActivation, Elements(heads) * (element_ + 2 * accum_), Again::kUnlessNone));
    forward.push_back(Scan(ScanKernel::kSsd, Pass::kForward, state, Again::kUnlessNone));
    AddStates(kKind, StateOrder::kForward, &StateExchange::state_bytes, &forward);
    forward.push_back(Linear(inner, d, Again::kUnlessElementwise));
    forward.push_back(GatedNorm(inner));
    forward.push_back(Linear(d, inner));

    ops.backward = {LinearGradient(d, inner), GatedNorm(inner), GatedNormBackward(inner),
                    Scan(ScanKernel::kSsd, Pass::kBackward, state)};
    AddStates(kKind, StateOrder::kBackward, &StateExchange::state_bytes, &ops.backward);
    ops.backward.push_back(LinearGradient(d, inner));
    ops.backward.push_back(OverBack(PassKind::kActivation, Elements(heads) * (2 * element_ + 2 * accum_)));
    ops.backward.push_back(OverBack(PassKind::kConvolution, 3 * Elements(bcx) * element_));
    AddStates(kKind, StateOrder::kBackward, &StateExchange::halo_bytes, &ops.backward);
    ops.backward.push_back(LinearGradient(inner + heads, d));
    ops.backward.push_back(LinearGradient(inner + heads, d));
    AddInputGradients({{bcx, d}}, &ops);
    return ops;
  }
  Op GatedNorm(int64_t columns) const { return Over(PassKind::kGatedNorm, 3 * Elements(columns) * element_); }
  Op GatedNormBackward(int64_t columns) const {
    return OverBack(PassKind::kGatedNorm, 5 * Elements(columns) * element_);
  }

  BranchOps Lightning() const {
    const LinearSpec& linear = spec_.lightning;
    constexpr BranchKind kKind = BranchKind::kLightning;
    const int64_t d = spec_.d_model, heads = linear.heads / tp_, values = heads * linear.value_dim;
    const int64_t qkv = 2 * heads * linear.key_dim + values;
    const int64_t state = heads * linear.key_dim * linear.value_dim;
    const Op decays = Over(PassKind::kMove, Elements(heads) * accum_, Again::kUnlessNone);
    BranchOps ops;
    ops.forward = {Linear(qkv, d, Again::kUnlessElementwise),
                   Over(PassKind::kActivation, 2 * Elements(qkv) * element_, Again::kUnlessNone), decays,
                   Scan(ScanKernel::kSsd, Pass::kForward, state, Again::kUnlessNone)};
    AddStates(kKind, StateOrder::kForward, &StateExchange::state_bytes, &ops.forward);
    ops.forward.push_back(Linear(values, d, Again::kUnlessElementwise));
    ops.forward.push_back(GatedNorm(values));
    ops.forward.push_back(Linear(d, values));

    ops.backward = {LinearGradient(d, values), GatedNorm(values), GatedNormBackward(values), decays,
                    Scan(ScanKernel::kSsd, Pass::kBackward, state)};
    AddStates(kKind, StateOrder::kBackward, &StateExchange::state_bytes, &ops.backward);
    ops.backward.push_back(LinearGradient(d, values));
    ops.backward.push_back(OverBack(PassKind::kActivation, 3 * Elements(qkv) * element_));
    AddInputGradients({{qkv, d}, {values, d}}, &ops);
    return ops;
  }

  BranchOps Based() const {
    const LinearSpec& linear = spec_.based;
    constexpr BranchKind kKind = BranchKind::kBased;
    const int64_t d = spec_.d_model, heads = linear.heads / tp_, values = heads * linear.value_dim;
    const int64_t keys = heads * linear.key_dim, ones = values + heads;
    const int64_t features = heads * TaylorFeatures(linear.key_dim);
    const int64_t state = features * (linear.value_dim + 1);
    const Op featured = Over(PassKind::kActivation, Elements(keys + features) * element_, Again::kUnlessNone);
    const Op normalised = Over(PassKind::kMove, Elements(ones + values) * element_);
    const Op no_decay = Over(PassKind::kMove, Elements(heads) * accum_, Again::kUnlessNone);
    BranchOps ops;
    ops.forward = {Linear(keys + values, d, Again::kUnlessElementwise), featured,
                   Over(PassKind::kMove, Elements(values + ones) * element_, Again::kUnlessNone), no_decay,
                   Scan(ScanKernel::kSsd, Pass::kForward, state, Again::kUnlessNone)};
    AddStates(kKind, StateOrder::kForward, &StateExchange::state_bytes, &ops.forward);
    ops.forward.push_back(Linear(keys, d, Again::kUnlessElementwise));
    ops.forward.push_back(featured);
    ops.forward.push_back(normalised);
    ops.forward.push_back(Linear(d, values));

    ops.backward = {normalised, LinearGradient(d, values),
                    Over(PassKind::kMove, Elements(2 * ones + values) * element_), no_decay,
                    Scan(ScanKernel::kSsd, Pass::kBackward, state)};
    AddStates(kKind, StateOrder::kBackward, &StateExchange::state_bytes, &ops.backward);
    ops.backward.push_back(LinearGradient(d, values));
    ops.backward.insert(ops.backward.end(), 2,
                        OverBack(PassKind::kActivation, Elements(2 * keys + features) * element_));
    ops.backward.push_back(Over(PassKind::kMove, Elements(values + ones) * element_));
    AddInputGradients({{keys + values, d}, {keys, d}}, &ops);
    return ops;
  }

  BranchOps DeltaNet() const {
    const LinearSpec& linear = spec_.delta;
    constexpr BranchKind kKind = BranchKind::kDeltaNet;
    const int64_t d = spec_.d_model, heads = linear.heads / tp_, values = heads * linear.value_dim;
    const int64_t qk = 2 * heads * linear.key_dim, qkv = qk + values;
    const int64_t state = heads * linear.key_dim * linear.value_dim;
    const PassKind convolved = linear.conv > 0 ? PassKind::kConvolution : PassKind::kActivation;
    const auto scan = [&](Pass pass, Again again) {
      return Scan(ScanKernel::kDeltaRule, pass, state, again);
    };
    BranchOps ops;
    AddStates(kKind, StateOrder::kForward, &StateExchange::halo_bytes, &ops.forward);
    for (const Op& op :
         {Linear(qkv, d, Again::kUnlessElementwise), Linear(2 * heads, d, Again::kUnlessElementwise),
          Over(convolved, 2 * Elements(qkv) * element_, Again::kUnlessNone),
          Over(PassKind::kNorm, 2 * Elements(qk) * element_, Again::kUnlessNone),
          Over(PassKind::kActivation, Elements(heads) * 2 * (element_ + accum_), Again::kUnlessNone)}) {
      ops.forward.push_back(op);
    }
    // What a segment does to states is a scan of its own, which only ranks of a sequence need.
    if (run_.cp > 1) ops.forward.push_back(scan(Pass::kForward, Again::kNever));
    AddStates(kKind, StateOrder::kForward, &StateExchange::state_bytes, &ops.forward);
    for (const Op& op : {Linear(values, d, Again::kUnlessElementwise),
                         scan(Pass::kForward, Again::kUnlessNone), GatedNorm(values), Linear(d, values)}) {
      ops.forward.push_back(op);
    }

    ops.backward = {LinearGradient(d, values), GatedNorm(values), GatedNormBackward(values)};
    if (run_.cp > 1) ops.backward.push_back(scan(Pass::kForward, Again::kNever));
    AddStates(kKind, StateOrder::kBackward, &StateExchange::state_bytes, &ops.backward);
    for (const Op& op : {LinearGradient(d, values), scan(Pass::kBackward, Again::kNever),
                         OverBack(PassKind::kNorm, 4 * Elements(qk) * element_),
                         OverBack(PassKind::kActivation, Elements(heads) * 2 * (element_ + accum_)),
                         OverBack(convolved, 3 * Elements(qkv) * element_)}) {
      ops.backward.push_back(op);
    }
    AddStates(kKind, StateOrder::kBackward, &StateExchange::halo_bytes, &ops.backward);
    ops.backward.push_back(LinearGradient(values, d));
    ops.backward.push_back(LinearGradient(values, d));
    AddInputGradients({{qkv, d}, {2 * heads, d}}, &ops);
    return ops;
  }

  const ModelSpec& spec_;
  const MemoryInputs& run_;
  const SequenceLayout& layout_;
  int64_t tp_;
  double element_, accum_;  // bytes
};

}  // namespace

LayerOps EmbeddingOps(const OpInputs& inputs) { return Lister(inputs).Embedding(); }
LayerOps OpsOf(const OpInputs& inputs, size_t layer) {
  return Lister(inputs).Layer(inputs.model.layers[layer]);
}
LayerOps HeadOps(const OpInputs& inputs) { return Lister(inputs).Head(); }

}  // namespace annulus
