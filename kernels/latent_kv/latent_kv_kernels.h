#pragma once

// Typed kernels of annulus/ops/latent_kv.h, one overload per device. Arguments are checked.

#include "annulus/ops/latent_kv.h"

namespace annulus::kernels {

template <typename T>
absl::Status PackLatentKv(CpuTag, Context& ctx, const LatentHeads& heads, ConstMatrixRef up,
                          ConstMatrixRef k_rope, MatrixRef kv);
template <typename T>
absl::Status PackLatentKv(CudaTag, Context& ctx, const LatentHeads& heads, ConstMatrixRef up,
                          ConstMatrixRef k_rope, MatrixRef kv);

// From: of dkv. T: of dup.
template <typename From, typename T>
absl::Status UnpackLatentKvGradient(CpuTag, Context& ctx, const LatentHeads& heads, ConstMatrixRef dkv,
                                    MatrixRef dup, Write write, MatrixRef dk_rope);
template <typename From, typename T>
absl::Status UnpackLatentKvGradient(CudaTag, Context& ctx, const LatentHeads& heads, ConstMatrixRef dkv,
                                    MatrixRef dup, Write write, MatrixRef dk_rope);

}  // namespace annulus::kernels
