// Memory of training. What each mixer allocates is told here once more, in its order: tests hold the plan to
// what training really takes.

#include <algorithm>

#include "annulus/model/cost.h"
#include "annulus/ops/cross_entropy.h"
#include "annulus/ops/taylor_features.h"

namespace annulus {
namespace {

bool KeepsNorms(Recompute recompute) { return recompute == Recompute::kNone; }
bool KeepsProducts(Recompute recompute) {
  return recompute == Recompute::kNone || recompute == Recompute::kElementwise;
}

// Bytes of a branch. What the policy does not keep is a temporary of its backward.
struct BranchBytes {
  int64_t always = 0;       // kept whatever the policy
  int64_t products = 0;     // of matrices, and outputs of scans
  int64_t elementwise = 0;  // activations, norms, convolutions, chunk states
  int64_t output = 0;       // of attention
  int64_t temporaries = 0;  // of backward, to its end
  // One after the other, on top of those:
  int64_t attention = 0;  // beside the buffers of its exchange
  int64_t momentary = 0;
  int64_t last = 0;
  int64_t slots = 0;  // of the exchange
};

// A layer with a sequence of states.
struct StateShape {
  int64_t heads = 0;
  int64_t state = 0;       // elements of a head's state
  int64_t transition = 1;  // elements of what a segment does to it
  int64_t chunk = 1;
};

class Planner {
 public:
  Planner(const ModelSpec& spec, const MemoryInputs& inputs)
      : spec_(spec), inputs_(inputs), element_(SizeOf(inputs.dtype)), accum_(SizeOf(AccumOf(inputs.dtype))) {}

  // The residual stream, which tensor-parallel ranks split.
  int64_t stream() const { return Compute(spec_.d_model) / inputs_.tp; }

  int64_t Kept(const LayerSpec& layer) const {
    int64_t bytes = KeepsNorms(inputs_.recompute) ? stream() : 0;
    for (const BranchSpec& branch : layer.branches) bytes += Kept(BytesOf(branch, {}));
    if (layer.combine == Combine::kMeanNorm) bytes += Branches(layer) * stream();
    return bytes;
  }
  // Of what later layers take from this one.
  int64_t KeptForLaterLayers(const LayerSpec& layer) const {
    int64_t bytes = 0;
    for (const BranchSpec& branch : layer.branches) {
      if (branch.kind != BranchKind::kAttention) continue;
      bytes += Sums(KvColumns()) + (KeepsProducts(inputs_.recompute) ? 0 : Compute(KvColumns()));
    }
    return bytes;
  }
  int64_t Temporaries(const LayerSpec& layer) const {
    const Shared shared = SharedBy(layer);
    int64_t most = 0;
    for (const BranchSpec& branch : layer.branches) {
      const int64_t own_dx = Branches(layer) > 1 && !SumsInputGradient(branch) ? stream() : 0;
      const int64_t normed = layer.combine == Combine::kMeanNorm ? 2 * stream() : 0;
      most = std::max(most, own_dx + normed + Temporaries(BytesOf(branch, shared)));
    }
    const int64_t gathered = inputs_.tp > 1 ? shared.count() * Compute(spec_.d_model) : 0;
    return most + gathered + stream() + (KeepsNorms(inputs_.recompute) ? 0 : stream());
  }
  int64_t Slots(const LayerSpec& layer) const {
    int64_t most = 0;
    for (const BranchSpec& branch : layer.branches) most = std::max(most, BytesOf(branch, {}).slots);
    return most;
  }
  int64_t Loss() const {
    const int64_t rows = (spec_.vocab_size + inputs_.tp - 1) / inputs_.tp;
    const VocabularyHeld held = inputs_.tp > 1 ? VocabularyHeld::kPart : VocabularyHeld::kWhole;
    // Normed input and its gradient, and those of the whole group's tokens; two numbers of each from each
    // rank.
    const int64_t chunk = std::min(inputs_.local_tokens, kLossChunkTokens);
    const int64_t gathered =
        inputs_.tp > 1 ? 2 * Compute(spec_.d_model) + inputs_.tp * chunk * 2 * accum_ : 0;
    return LinearCrossEntropyScratchBytes(inputs_.device, inputs_.dtype, inputs_.local_tokens, rows, held) +
           2 * stream() + gathered;
  }

 private:
  // Of so many columns of each token of this cp rank.
  int64_t Compute(int64_t columns) const { return inputs_.local_tokens * columns * element_; }
  int64_t Sums(int64_t columns) const { return inputs_.local_tokens * columns * accum_; }

  static int64_t Branches(const LayerSpec& layer) { return static_cast<int64_t>(layer.branches.size()); }
  int64_t KvColumns() const { return 2 * std::max<int64_t>(1, spec_.kv_heads / inputs_.tp) * spec_.head_dim; }

  int64_t Kept(const BranchBytes& bytes) const {
    return bytes.always + (KeepsProducts(inputs_.recompute) ? bytes.products : 0) +
           (KeepsNorms(inputs_.recompute) ? bytes.elementwise : 0) +
           (inputs_.recompute != Recompute::kBlock ? bytes.output : 0);
  }
  int64_t Temporaries(const BranchBytes& bytes) const {
    const int64_t all = bytes.always + bytes.products + bytes.elementwise + bytes.output;
    const int64_t slots = inputs_.exchange == ExchangeMemory::kWorkspace ? bytes.slots : 0;
    return all - Kept(bytes) + bytes.temporaries +
           std::max({bytes.attention + slots, bytes.momentary, bytes.last});
  }

  // What branches side by side have in common of the group's tokens: x, the gradient of y, and the sum of
  // gradients of x.
  struct Shared {
    bool x = false, dy = false, dx = false;
    int64_t count() const { return (x ? 1 : 0) + (dy ? 1 : 0) + (dx ? 1 : 0); }
  };
  static bool SumsInputGradient(const BranchSpec& branch) {
    return branch.kind != BranchKind::kLatentAttention;
  }
  static Shared SharedBy(const LayerSpec& layer) {
    const auto summands = std::count_if(layer.branches.begin(), layer.branches.end(), SumsInputGradient);
    if (Branches(layer) == 1) return {};
    return {.x = true, .dy = layer.combine == Combine::kSum, .dx = summands > 1};
  }

  // With x and the gradient of y of all of the group's tokens, and at last a summand of the gradient of x.
  BranchBytes Gathering(BranchBytes bytes, const Shared& shared) const {
    if (inputs_.tp == 1) return bytes;
    bytes.temporaries += ((shared.x ? 0 : 1) + (shared.dy ? 0 : 1)) * Compute(spec_.d_model);
    bytes.last = shared.dx ? 0 : Compute(spec_.d_model);
    return bytes;
  }
  // Latent attention takes x where queries are projected from it.
  BranchBytes LatentWith(const BranchSpec& branch, const Shared& shared) const {
    BranchBytes bytes = Latent(branch);
    const bool takes_shared_x = shared.x && spec_.latent.q_rank == 0;
    if (inputs_.tp > 1) {
      bytes.temporaries -= ((takes_shared_x ? 1 : 0) + (shared.dy ? 1 : 0)) * Compute(spec_.d_model);
    }
    return bytes;
  }

  BranchBytes BytesOf(const BranchSpec& branch, const Shared& shared) const {
    switch (branch.kind) {
      case BranchKind::kAttention:
        return Gathering(Attention(branch), shared);
      case BranchKind::kLatentAttention:
        return LatentWith(branch, shared);
      case BranchKind::kMamba:
        return Gathering(Mamba(), shared);
      case BranchKind::kLightning:
        return Gathering(Lightning(), shared);
      case BranchKind::kBased:
        return Gathering(Based(), shared);
      case BranchKind::kDeltaNet:
        return Gathering(DeltaNet(), shared);
      case BranchKind::kMlp:
        return Gathering(Mlp(), shared);
    }
    return {};
  }

  // Null where nothing was planned.
  const PlannedExchange* PlannedFor(const BranchSpec& branch) const {
    const auto found = inputs_.planned.find(
        {.branch = branch.kind, .window = branch.window, .latent_groups = branch.latent_groups});
    return found == inputs_.planned.end() ? nullptr : &found->second;
  }

  // As planned; of a KV ring two of what travels and four of its gradients: with two ranks there is but one
  // to come and go.
  int64_t SlotBytes(const BranchSpec& branch, int64_t columns) const {
    if (const PlannedExchange* planned = PlannedFor(branch)) return planned->buffer_bytes;
    const int64_t peers = std::min<int64_t>(inputs_.cp - 1, 2);
    return peers * (Compute(columns) + 2 * Sums(columns));
  }

  BranchBytes Mlp() const {
    const int64_t inner = spec_.d_ff / inputs_.tp;
    const bool gated = spec_.activation == Activation::kSwiglu;
    // Gradients of h and, with a gate, of gate and up; without, that of up takes the place of that of h.
    return {.products = Compute(gated ? 2 * inner : inner),
            .elementwise = Compute(inner),
            .temporaries = Compute(gated ? 3 * inner : inner)};
  }

  BranchBytes Attention(const BranchSpec& branch) const {
    const int64_t heads = spec_.heads / inputs_.tp, q = heads * spec_.head_dim, kv = KvColumns();
    BranchBytes bytes;
    bytes.products = Compute(branch.kv_layers_back > 0 ? q : q + kv);
    bytes.output = Compute(q) + Sums(heads);
    bytes.temporaries = Compute(2 * q + kv);  // dout, dq, dkv
    bytes.attention = BackwardSums(heads, q + kv);
    bytes.slots = SlotBytes(branch, kv);
    return bytes;
  }

  // Of an attention's backward: delta, and dq and dkv summed over blocks.
  int64_t BackwardSums(int64_t heads, int64_t columns) const {
    return Sums(heads) + (accum_ != element_ ? Sums(columns) : 0);
  }

  // Latents are gathered instead of x. Queries of a head group are gathered and their gradients summed where
  // it has several ranks.
  BranchBytes Latent(const BranchSpec& branch) const {
    const LatentSpec& latent = spec_.latent;
    const LatentShard mesh =
        LatentShardOf({.rank = 0, .size = static_cast<int>(inputs_.tp)}, branch.latent_groups);
    const bool shared = mesh.latent_groups > 1;
    const int64_t heads = latent.heads / mesh.head_groups, own = latent.heads / inputs_.tp;
    const int64_t here = branch.latent_groups / mesh.latent_groups;
    const int64_t dim = latent.nope_dim + latent.rope_dim, q = heads * dim, v = heads * latent.v_dim;
    const int64_t packed = latent.q_rank + latent.kv_rank + latent.rope_dim;
    const int64_t whole_x = latent.q_rank == 0 ? spec_.d_model : 0;  // queries are projected from it
    BranchBytes bytes;
    bytes.products = Compute(q) + Compute(packed) / inputs_.tp;
    bytes.elementwise = Compute(packed) / inputs_.tp;
    bytes.output = here * (Compute(v) + Sums(heads));
    if (branch.latent_groups > 1) bytes.output += Compute(own * latent.v_dim);  // the mean over branches
    // Gradients of the mean, of packed latents, of queries and of the shared key part.
    bytes.temporaries = Compute(own * latent.v_dim + q) + Sums(packed) / inputs_.tp + Sums(latent.rope_dim);
    if (shared) bytes.temporaries += Compute(v) + (KeepsProducts(inputs_.recompute) ? 0 : Compute(own * dim));
    if (inputs_.tp > 1) bytes.temporaries += Compute(spec_.d_model + whole_x + packed) + Sums(packed);
    // Of one branch at a time: its latents and their gradients; expanded keys and values, all of them at
    // home, or those of one step of the ring.
    const int64_t columns = latent.kv_rank / branch.latent_groups, row = columns + latent.rope_dim;
    const int64_t of_branch = Compute(row) + Sums(row) + (here > 1 ? Compute(q) : 0);
    const int64_t expanding = Compute(heads * (latent.nope_dim + latent.v_dim));
    const PlannedExchange* planned = PlannedFor(branch);
    if (inputs_.cp == 1 || (planned != nullptr && planned->expanded_at_home)) {
      bytes.attention = of_branch + 2 * Compute(q + v) + BackwardSums(heads, 2 * q + v);
      bytes.momentary = of_branch + 2 * Compute(q + v) + expanding;
    } else {
      bytes.attention = of_branch + BackwardSums(heads, q) + Compute(q + v) + Sums(q + v) + expanding;
    }
    bytes.last = inputs_.tp > 1 ? Compute(whole_x) : 0;
    if (shared) bytes.last = Compute(own * dim) + std::max(Compute(q), bytes.last);
    bytes.slots = SlotBytes(branch, row);
    return bytes;
  }

  int64_t States(const StateShape& of, int64_t count, int64_t elements) const {
    return count * inputs_.sequences * of.heads * elements * accum_;
  }
  int64_t ChunkStates(const StateShape& of) const {
    const int64_t rows = inputs_.local_tokens / inputs_.sequences / inputs_.segments;
    return States(of, inputs_.segments * ((rows + of.chunk - 1) / of.chunk), of.state);
  }
  int64_t SegmentStates(const StateShape& of) const { return States(of, inputs_.segments, of.state); }
  // A summary of each segment, all ranks' of them, and what comes in.
  int64_t PassedStates(const StateShape& of) const {
    const int64_t own = States(of, inputs_.segments, of.state + of.transition);
    const int64_t copies = inputs_.cp > kMostGatheringRanks ? 2 : inputs_.cp;
    return own + copies * own + SegmentStates(of);
  }
  // Of a scan: states of chunks with the logarithms of their decays; and in backward the gradients of states.
  int64_t ScanStates(const StateShape& of) const { return ChunkStates(of) + ChunkStates(of) / of.state; }
  int64_t ScanTemporaries(const StateShape& of) const { return ChunkStates(of) + PassedStates(of); }

  int64_t Halo(int64_t taps, int64_t channels) const {
    return std::max<int64_t>(0, taps - 1) * inputs_.segments * inputs_.sequences * channels * element_;
  }

  BranchBytes Mamba() const {
    const MambaSpec& mamba = spec_.mamba;
    const int64_t heads = mamba.heads / inputs_.tp, inner = heads * mamba.head_dim;
    const int64_t bc = std::max<int64_t>(1, mamba.groups / inputs_.tp) * mamba.state;
    const int64_t xbc = inner + 2 * bc, proj = xbc + inner + heads;
    const StateShape states{heads, mamba.state * mamba.head_dim, 1, mamba.chunk};
    const int64_t halo = Halo(mamba.conv, xbc);
    return {.always = halo + SegmentStates(states),
            .products = Compute(proj + inner),
            .elementwise = Compute(xbc) + Sums(2 * heads) + ScanStates(states),
            .temporaries = Compute(proj + 3 * inner + xbc) + Sums(2 * heads),
            .momentary = std::max(ScanTemporaries(states), 4 * halo)};
  }

  // Decays are written out for each scan: again where forward's are computed again.
  int64_t DecayBytes(int64_t heads) const {
    return Sums(KeepsNorms(inputs_.recompute) ? 2 * heads : 3 * heads);
  }

  BranchBytes Lightning() const {
    const LinearSpec& linear = spec_.lightning;
    const int64_t heads = linear.heads / inputs_.tp, values = heads * linear.value_dim;
    const int64_t qkv = 2 * heads * linear.key_dim + values;
    const StateShape states{heads, linear.key_dim * linear.value_dim, 1, linear.chunk};
    return {.always = SegmentStates(states),
            .products = Compute(qkv + 2 * values),
            .elementwise = Compute(qkv) + ScanStates(states),
            .temporaries = Compute(4 * values + qkv) + DecayBytes(heads),
            .momentary = ScanTemporaries(states)};
  }

  BranchBytes Based() const {
    const LinearSpec& linear = spec_.based;
    const int64_t heads = linear.heads / inputs_.tp, values = heads * linear.value_dim, ones = values + heads;
    const int64_t qk = 2 * heads * linear.key_dim, features = TaylorFeatures(linear.key_dim);
    const StateShape states{heads, features * (linear.value_dim + 1), 1, linear.chunk};
    return {.always = SegmentStates(states),
            .products = Compute(qk + values + ones),
            .elementwise = Compute(2 * heads * features + ones) + ScanStates(states),
            .temporaries = Compute(qk + 3 * values + 2 * ones + 2 * heads * features) + DecayBytes(heads),
            // Gradients of q, k and v come after the scan.
            .momentary = std::max<int64_t>(0, ScanTemporaries(states) - Compute(qk + values))};
  }

  BranchBytes DeltaNet() const {
    const LinearSpec& linear = spec_.delta;
    const int64_t heads = linear.heads / inputs_.tp, values = heads * linear.value_dim;
    const int64_t qk = 2 * heads * linear.key_dim, qkv = qk + values;
    const StateShape states{heads, linear.key_dim * linear.value_dim, linear.key_dim * linear.key_dim,
                            linear.chunk};
    const int64_t halo = Halo(linear.conv, qkv);
    const int64_t passed = inputs_.cp > 1 ? PassedStates(states)
                                          : SegmentStates(states) + States(states, inputs_.segments,
                                                                           states.state + states.transition);
    return {.always = halo + SegmentStates(states),
            .products = Compute(qkv + 2 * values + 2 * heads),
            .elementwise = Compute(qkv + qk) + Sums(2 * heads) + ChunkStates(states),
            .temporaries = Compute(4 * values + qk + 2 * qkv + 2 * heads) + Sums(2 * heads) + passed,
            .momentary = 3 * halo};
  }

  const ModelSpec& spec_;
  const MemoryInputs& inputs_;
  int64_t element_, accum_;
};

bool IsTakenFrom(const std::vector<LayerSpec>& layers, size_t layer) {
  for (size_t later = layer + 1; later < layers.size(); ++later) {
    for (const BranchSpec& branch : layers[later].branches) {
      if (branch.kv_layers_back > 0 && later - static_cast<size_t>(branch.kv_layers_back) == layer)
        return true;
    }
  }
  return false;
}

int64_t ValueBytes(const ParamTable& table, DType dtype) {
  int64_t bytes = 0;
  for (const Bucket& bucket : table.buckets) {
    bytes += bucket.elements * SizeOf(bucket.wide ? AccumOf(dtype) : dtype);
  }
  return bytes;
}

// Moments, and a master copy where values are narrower than it.
int64_t StateElements(const ParamTable& table, DType dtype) {
  int64_t elements = 0;
  for (const Bucket& bucket : table.buckets) {
    elements += (bucket.wide || AccumOf(dtype) == dtype ? 2 : 3) * bucket.elements;
  }
  return elements;
}

}  // namespace

MemoryPlan PlanMemory(const ModelSpec& spec, const MemoryInputs& inputs) {
  const ParamTable table = BuildParamTable(spec, {.rank = 0, .size = static_cast<int>(inputs.tp)});
  const Planner planner(spec, inputs);
  int64_t kept = planner.stream(), temporaries = 0, slots = 0;  // kept: the last layer's output
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const LayerSpec& layer = spec.layers[i];
    kept += planner.stream() + planner.Kept(layer);
    if (IsTakenFrom(spec.layers, i)) kept += planner.KeptForLaterLayers(layer);
    temporaries = std::max(temporaries, planner.Temporaries(layer));
    slots = std::max(slots, planner.Slots(layer));
  }
  MemoryPlan plan;
  const int64_t accum = SizeOf(AccumOf(inputs.dtype));
  plan.parameters = ValueBytes(table, inputs.dtype);
  plan.gradients = GradientElements(table, inputs.gradients) * accum;
  plan.optimizer = (StateElements(table, inputs.dtype) + SharedGradientElements(table, inputs.gradients)) *
                   accum / inputs.shards;
  plan.activations = kept;
  plan.workspace = std::max(temporaries, planner.Loss()) + planner.stream();
  if (inputs.exchange == ExchangeMemory::kOwn) plan.exchange = slots;
  return plan;
}

std::array<MemoryPlan::Part, 6> MemoryPlan::parts() const {
  return {{{"parameters", parameters},
           {"gradients", gradients},
           {"optimizer", optimizer},
           {"activations", activations},
           {"workspace", workspace},
           {"exchange", exchange}}};
}

int64_t MemoryPlan::total() const {
  int64_t bytes = 0;
  for (const Part& part : parts()) bytes += part.bytes;
  return bytes;
}

}  // namespace annulus
