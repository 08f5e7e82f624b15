#pragma once

// Keys and values of latent attention (DeepSeek-V2, 2024), expanded: what the up-projection made of the
// latent and the one key part that carries positions, laid out as attention reads them.
//
//   up:     | n0 v0 | n1 v1 | ..        of head h its key part n_h [nope] and its value v_h [v]
//   k_rope: | r |                       shared by all heads
//   kv:     | n0 r | n1 r | .. | v0 | v1 | ..

#include <cstdint>

#include "annulus/base/status.h"
#include "annulus/device/context.h"
#include "annulus/ops/linear.h"

namespace annulus {

struct LatentHeads {
  int64_t heads = 0;
  int64_t nope = 0, rope = 0, v = 0;  // of a head

  int64_t k_dim() const { return nope + rope; }
  int64_t up_columns() const { return heads * (nope + v); }
  int64_t kv_columns() const { return heads * (k_dim() + v); }
};

//   up: [tokens, up_columns]   k_rope: [tokens, rope]   kv: [tokens, kv_columns]
absl::Status PackLatentKv(Context& ctx, const LatentHeads& heads, ConstMatrixRef up, ConstMatrixRef k_rope,
                          MatrixRef kv);

// The gradient: dup = the columns of each head, dk_rope (=, +=) the sum over heads, in an order fixed by the
// shape.
//   dkv: as kv, in the dtype of dup or its accumulator dtype   dup: as up   dk_rope: accumulator dtype
absl::Status UnpackLatentKvGradient(Context& ctx, const LatentHeads& heads, ConstMatrixRef dkv, MatrixRef dup,
                                    Write write, MatrixRef dk_rope);

}  // namespace annulus
