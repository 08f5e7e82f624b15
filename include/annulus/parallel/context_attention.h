#pragma once

// Softmax attention of a sequence that is split over a context-parallel group: block kernels and the exchange
// of blocks, driven by an ExchangePlan. One rank is the plan without transfers.

#include "annulus/parallel/attention_geometry.h"

namespace annulus {

// All tensors in the compute dtype but for lse, in the accumulator dtype. Results are overwritten.
//   q: [rows, batch, heads * head_dim]     kv: [rows, batch, kv_heads * (head_dim + v_head_dim)], keys first
//   out: [rows, batch, heads * v_head_dim]    lse: [rows, batch, heads]
// Where shape.latent is given:
//   kv: [rows, batch, columns + rope], latents (latent_expansion.h)   dkv: the same, accumulator dtype
struct ContextAttentionForwardArgs {
  TensorRef q, kv;
  TensorRef out, lse;
  LatentWeights latent = {};  // of all heads, where keys and values are given as latents
};
absl::Status ContextAttentionForward(Context& ctx, AttentionGeometry& geometry,
                                     const ContextAttentionShape& shape,
                                     const ContextAttentionForwardArgs& args, ExchangeStats* stats);

// out, lse: forward's results. dq, dkv: as q and kv.
struct ContextAttentionBackwardArgs {
  TensorRef q, kv, out, lse, dout;
  TensorRef dq, dkv;
  LatentWeights latent = {};  // as in forward; its gradient is added to
};
absl::Status ContextAttentionBackward(Context& ctx, AttentionGeometry& geometry,
                                      const ContextAttentionShape& shape,
                                      const ContextAttentionBackwardArgs& args, ExchangeStats* stats);

}  // namespace annulus
