#pragma once

// Keys and values that travel as latents (DeepSeek-V2's compressed KV): each rank expands, from the rows that
// come by, those of the heads that it computes for.
//
//   latents: [rows, batch, columns + rope]: the latent after its norm, then the shared key part after RoPE
//   kv:      [rows, batch, heads * (nope + rope) keys, heads * v values]

#include "annulus/ops/latent_kv.h"

namespace annulus {

// What latent attention exchanges.
enum class LatentExchange {
  kAuto,      // what is predicted to be faster; latents where the machine is not known
  kLatent,    // latents, expanded anew by each rank that they come to
  kExpanded,  // keys and values, expanded at home
};

struct LatentShape {
  int64_t columns = 0;                // of the latent
  int64_t nope = 0, rope = 0, v = 0;  // of a head

  int64_t row() const { return columns + rope; }
  LatentHeads Heads(int64_t heads) const { return {.heads = heads, .nope = nope, .rope = rope, .v = v}; }
  friend bool operator==(const LatentShape&, const LatentShape&) = default;
};

// The up-projection: of each head the rows of its key part, then of its value.
struct LatentWeights {
  TensorRef up = {};   // [heads * (nope + v), columns]
  TensorRef dup = {};  // accumulator dtype; added to in backward, not used in forward

  // Of heads [begin, end).
  LatentWeights Heads(const LatentShape& shape, int64_t begin, int64_t end) const;
};

// kv: all heads of `weights`.
absl::Status ExpandLatents(Context& ctx, const LatentShape& shape, const LatentWeights& weights,
                           ConstTensorRef latents, TensorRef kv);

// dlatents (=, +=) and weights.dup += gradients through the expansion. Only the products' operands are in the
// compute dtype: sums, over heads and over the calls of all ranks, are not rounded to it on their way.
//   dkv: as kv, compute or accumulator dtype   dlatents: as latents, accumulator dtype
absl::Status ExpandLatentsBackward(Context& ctx, const LatentShape& shape, const LatentWeights& weights,
                                   ConstTensorRef latents, ConstTensorRef dkv, Write write,
                                   TensorRef dlatents);

}  // namespace annulus
