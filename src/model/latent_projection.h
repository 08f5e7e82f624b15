#pragma once

// From the residual stream to the latents of latent attention, on the tokens that this tensor-parallel rank
// has, and to every rank of the group.
//
//   q_down x -> norm -> c_q           columns of the packed latents:
//   kv_down x -> norms -> c_0 c_1 ..  | c_q | c_0 | .. | c_{g-1} | k_rope |
//   k_rope x -> RoPE -> k_rope
//
// Latents are gathered instead of x: (q_rank + kv_rank + rope_dim) columns, not d_model. Each of the g
// branches of the latent has its own norm, over its part. Where queries are not compressed there is no c_q.

#include <vector>

#include "annulus/model/mixer.h"
#include "model_rope.h"

namespace annulus {

// Products of this rank's tokens, [tokens / tp, columns] each.
struct LatentProducts {
  TensorRef q;                      // before the norm; none without compression
  std::vector<TensorRef> branches;  // before the norm
  TensorRef k_rope;                 // after RoPE

  bool defined() const { return k_rope.defined(); }
};

class LatentProjection {
 public:
  explicit LatentProjection(const MixerArgs& args);

  // Places in the packed latents.
  int64_t columns() const { return RopeBegin() + rope_dim_; }
  int64_t BranchBegin(int64_t branch) const { return q_rank_ + branch * width_; }
  int64_t RopeBegin() const { return q_rank_ + branches_ * width_; }
  int64_t q_rank() const { return q_rank_; }
  int64_t width() const { return width_; }  // of a branch

  // Products in memory of `arena`.   x: [tokens / tp, d_model]
  absl::StatusOr<LatentProducts> Project(Context& ctx, ModelStep& step, Arena& arena, ConstTensorRef x) const;
  // packed: [tokens / tp, columns]
  absl::Status Normalize(Context& ctx, const LatentProducts& products, TensorRef packed) const;

  // dx (=, +=), and gradients of parameters, from those of the packed latents, [tokens / tp, columns],
  // accumulator dtype.
  absl::Status Backward(Context& ctx, ModelStep& step, ConstTensorRef x, const LatentProducts& products,
                        TensorRef dpacked, Write write, TensorRef dx) const;

 private:
  // A product with a norm behind it.
  struct Normalized {
    int64_t column;  // of the packed latents
    TensorRef down, ddown, norm, dnorm;
  };
  std::vector<Normalized> Parts() const;

  absl::Status Rotate(Context& ctx, ModelStep& step, RopeDirection direction, TensorRef k_rope) const;

  int64_t q_rank_, width_, branches_, rope_dim_;
  std::optional<RopeFrequencies> rope_;
  TensorRef q_down_, dq_down_, q_norm_, dq_norm_;
  TensorRef kv_down_, dkv_down_, kv_norm_, dkv_norm_;
  TensorRef k_rope_, dk_rope_;
};

}  // namespace annulus
