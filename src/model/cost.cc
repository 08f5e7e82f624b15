#include "annulus/model/cost.h"

#include <algorithm>

#include "annulus/model/params.h"
#include "annulus/ops/cross_entropy.h"

namespace annulus {
namespace {

// Per-token elements of one layer of each kind.
struct LayerElements {
  int64_t kept = 0;       // by the policy, the block input left out
  int64_t workspace = 0;  // live at the peak of its backward
};

LayerElements ElementsOf(const ModelSpec& spec, LayerKind kind, const MemoryInputs& inputs) {
  const int64_t d = spec.d_model;
  const bool keep_all = inputs.recompute == Recompute::kNone;
  // Gradient of the normed input; and, where they are not kept, the normed input and what is made of it.
  const int64_t norms = keep_all ? d : 2 * d;
  if (kind == LayerKind::kMlp)
    return {keep_all ? d + 3 * spec.d_ff : 0, norms + (keep_all ? 3 : 6) * spec.d_ff};
  const int64_t q = spec.heads * spec.head_dim, kv = 2 * spec.kv_heads * spec.head_dim;
  const int64_t output = q + spec.heads;
  const int64_t exchange_slots = inputs.cp_exchange ? 6 : 0;  // two of KV, four of their gradients
  LayerElements elements;
  elements.kept = (keep_all ? d + q + kv : 0) + (inputs.recompute == Recompute::kBlock ? 0 : output);
  elements.workspace = norms + (keep_all ? 0 : q + kv);
  elements.workspace += 2 * q + kv + spec.heads + exchange_slots * kv;  // dout, dq, dkv, delta
  if (inputs.recompute == Recompute::kBlock) elements.workspace += output;
  return elements;
}

}  // namespace

double MeanVisibleKeys(int64_t seq_len, int64_t window) {
  const double s = static_cast<double>(seq_len);
  const double w = window > 0 ? std::min<double>(static_cast<double>(window), s) : s;
  // Positions below w see p + 1 keys, the others w.
  return (w * (w + 1) / 2 + (s - w) * w) / s;
}

FlopsPerToken TrainingFlops(const ModelSpec& spec, int64_t seq_len) {
  double matmul = 0;
  for (const ParamInfo& info : BuildParamTable(spec).params) {
    const bool lookup_only = info.name == "embed.weight" && !spec.tied_head;
    if (info.shape.rank() == 2 && !lookup_only) matmul += static_cast<double>(info.shape.elements());
  }
  FlopsPerToken flops{6 * matmul, 6 * matmul};
  const double per_key = 12.0 * static_cast<double>(spec.heads * spec.head_dim);
  for (const LayerSpec& layer : spec.layers) {
    if (layer.kind != LayerKind::kAttention) continue;
    flops.causal += per_key * MeanVisibleKeys(seq_len, layer.window);
    flops.full += per_key * static_cast<double>(layer.window > 0 ? std::min(layer.window, seq_len) : seq_len);
  }
  return flops;
}

MemoryPlan PlanMemory(const ModelSpec& spec, const MemoryInputs& inputs) {
  const int64_t parameters = BuildParamTable(spec).elements();
  int64_t kept = spec.d_model, workspace = 0;  // the last layer's output
  for (const LayerSpec& layer : spec.layers) {
    const LayerElements elements = ElementsOf(spec, layer.kind, inputs);
    kept += spec.d_model + elements.kept;
    workspace = std::max(workspace, elements.workspace);
  }
  const int64_t loss_tokens =
      std::min(inputs.local_tokens, CpuLossChunkTokens(kLossChunkTokens, spec.vocab_size));
  const int64_t loss = loss_tokens * spec.vocab_size + 2 * inputs.local_tokens * spec.d_model;
  const int64_t gradient = inputs.local_tokens * spec.d_model;

  MemoryPlan plan;
  plan.parameters = plan.gradients = parameters * inputs.element_bytes;
  plan.optimizer = 3 * parameters * inputs.element_bytes / inputs.shards;
  plan.activations = kept * inputs.local_tokens * inputs.element_bytes;
  plan.workspace = (std::max(workspace * inputs.local_tokens, loss) + gradient) * inputs.element_bytes;
  return plan;
}

}  // namespace annulus
