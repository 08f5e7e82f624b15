#include <type_traits>

#include "kernels/common/arguments.h"
#include "kernels/latent_kv/latent_kv_kernels.h"

namespace annulus {
namespace {

using kernels::CheckMatrix;

absl::Status CheckSizes(const Context& ctx, const LatentHeads& heads, DType dtype) {
  if (heads.heads < 0 || heads.nope < 0 || heads.rope < 0 || heads.v < 0) {
    return Invalid("latent_kv.heads=", heads.heads, ", nope=", heads.nope, ", rope=", heads.rope,
                   ", v=", heads.v, ": expected no negative size");
  }
  if (kernels::IsCompute(ctx, dtype)) return absl::OkStatus();
  return Invalid("latent_kv.up.dtype=", Name(dtype), ": expected ", kernels::ComputeNames(ctx));
}

}  // namespace

absl::Status PackLatentKv(Context& ctx, const LatentHeads& heads, ConstMatrixRef up, ConstMatrixRef k_rope,
                          MatrixRef kv) {
  ANNULUS_RETURN_IF_ERROR(CheckSizes(ctx, heads, up.dtype));
  ANNULUS_RETURN_IF_ERROR(CheckMatrix("latent_kv.up", up, up.dtype, up.rows, heads.up_columns()));
  ANNULUS_RETURN_IF_ERROR(CheckMatrix("latent_kv.k_rope", k_rope, up.dtype, up.rows, heads.rope));
  ANNULUS_RETURN_IF_ERROR(CheckMatrix("latent_kv.kv", kv, up.dtype, up.rows, heads.kv_columns()));
  return VisitKernel(ctx, up.dtype, [&]<class T>(auto device) {
    return kernels::PackLatentKv<T>(device, ctx, heads, up, k_rope, kv);
  });
}

absl::Status UnpackLatentKvGradient(Context& ctx, const LatentHeads& heads, ConstMatrixRef dkv, MatrixRef dup,
                                    Write write, MatrixRef dk_rope) {
  const DType accum = AccumOf(dup.dtype), from = dkv.dtype == accum ? accum : dup.dtype;
  ANNULUS_RETURN_IF_ERROR(CheckSizes(ctx, heads, dup.dtype));
  ANNULUS_RETURN_IF_ERROR(CheckMatrix("latent_kv.dkv", dkv, from, dup.rows, heads.kv_columns()));
  ANNULUS_RETURN_IF_ERROR(CheckMatrix("latent_kv.dup", dup, dup.dtype, dup.rows, heads.up_columns()));
  ANNULUS_RETURN_IF_ERROR(CheckMatrix("latent_kv.dk_rope", dk_rope, accum, dup.rows, heads.rope));
  return VisitKernel(ctx, dup.dtype, [&]<class T>(auto device) {
    using Accum = std::conditional_t<std::is_same_v<T, BFloat16>, float, T>;
    return dkv.dtype == dup.dtype
               ? kernels::UnpackLatentKvGradient<T, T>(device, ctx, heads, dkv, dup, write, dk_rope)
               : kernels::UnpackLatentKvGradient<Accum, T>(device, ctx, heads, dkv, dup, write, dk_rope);
  });
}

}  // namespace annulus
