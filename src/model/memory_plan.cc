#include <algorithm>

#include "annulus/model/cost.h"
#include "annulus/model/params.h"
#include "annulus/ops/cross_entropy.h"

namespace annulus {
namespace {

// Per-token bytes of one layer.
struct LayerBytes {
  int64_t kept = 0;       // by the policy, the block input left out
  int64_t workspace = 0;  // live at the peak of its backward
};

// Of a layer's normed input and of its SwiGLU; of its matrix products.
bool KeepsNorms(Recompute recompute) { return recompute == Recompute::kNone; }
bool KeepsProducts(Recompute recompute) {
  return recompute == Recompute::kNone || recompute == Recompute::kElementwise;
}

// Slots of KV and of gradients.
int64_t SlotBytes(const ModelSpec& spec, const MemoryInputs& inputs) {
  return 2 * spec.kv_heads * spec.head_dim * (2 * SizeOf(inputs.dtype) + 4 * SizeOf(AccumOf(inputs.dtype)));
}

LayerBytes MlpBytes(const ModelSpec& spec, const MemoryInputs& inputs) {
  const int64_t d = spec.d_model, element = SizeOf(inputs.dtype);
  const bool norms = KeepsNorms(inputs.recompute), products = KeepsProducts(inputs.recompute);
  // Gradients of the normed input, of h and of gate and up; and what is not kept.
  return {.kept = ((norms ? d + spec.d_ff : 0) + (products ? 2 * spec.d_ff : 0)) * element,
          .workspace =
              (d + 3 * spec.d_ff + (norms ? 0 : d + spec.d_ff) + (products ? 0 : 2 * spec.d_ff)) * element};
}

LayerBytes AttentionBytes(const ModelSpec& spec, const MemoryInputs& inputs) {
  const int64_t d = spec.d_model, element = SizeOf(inputs.dtype), accum = SizeOf(AccumOf(inputs.dtype));
  const bool norms = KeepsNorms(inputs.recompute), products = KeepsProducts(inputs.recompute);
  const int64_t q = spec.heads * spec.head_dim, kv = 2 * spec.kv_heads * spec.head_dim;
  const int64_t output = q * element + spec.heads * accum;
  LayerBytes bytes;
  bytes.kept = ((norms ? d : 0) + (products ? q + kv : 0)) * element;
  if (inputs.recompute != Recompute::kBlock) bytes.kept += output;
  bytes.workspace = (d + (norms ? 0 : d) + (products ? 0 : q + kv)) * element;
  bytes.workspace += (2 * q + kv) * element + spec.heads * accum;  // dout, dq, dkv, delta
  if (accum != element) bytes.workspace += (q + kv) * accum;       // sums of dq and dkv over blocks
  if (inputs.exchange == ExchangeMemory::kWorkspace) bytes.workspace += SlotBytes(spec, inputs);
  if (inputs.recompute == Recompute::kBlock) bytes.workspace += output;
  return bytes;
}

}  // namespace

MemoryPlan PlanMemory(const ModelSpec& spec, const MemoryInputs& inputs) {
  const ParamTable table = BuildParamTable(spec);
  const int64_t parameters = table.elements();
  const int64_t element = SizeOf(inputs.dtype), accum = SizeOf(AccumOf(inputs.dtype));
  const int64_t stream = spec.d_model * element;  // of a token in the residual stream
  int64_t kept = stream, workspace = 0;           // the last layer's output
  bool attends = false;
  for (const LayerSpec& layer : spec.layers) {
    kept += stream;
    for (const BranchSpec& branch : layer.branches) {
      const bool attention = branch.kind == BranchKind::kAttention;
      const LayerBytes bytes = attention ? AttentionBytes(spec, inputs) : MlpBytes(spec, inputs);
      kept += bytes.kept;
      workspace = std::max(workspace, bytes.workspace);
      attends = attends || attention;
    }
  }
  const int64_t loss =
      LinearCrossEntropyScratchBytes(inputs.device, inputs.dtype, inputs.local_tokens, spec.vocab_size) +
      2 * inputs.local_tokens * stream;

  MemoryPlan plan;
  plan.parameters = parameters * element;
  plan.gradients = GradientElements(table, inputs.gradients) * accum;
  const int64_t states = (accum == element ? 2 : 3) * parameters;
  plan.optimizer = (states + SharedGradientElements(table, inputs.gradients)) * accum / inputs.shards;
  plan.activations = kept * inputs.local_tokens;
  plan.workspace = std::max(workspace * inputs.local_tokens, loss) + stream * inputs.local_tokens;
  if (inputs.exchange == ExchangeMemory::kOwn && attends)
    plan.exchange = SlotBytes(spec, inputs) * inputs.local_tokens;
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
