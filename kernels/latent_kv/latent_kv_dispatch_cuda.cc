#include "kernels/common/cuda_call.h"
#include "kernels/latent_kv/latent_kv_cuda.h"
#include "kernels/latent_kv/latent_kv_kernels.h"

namespace annulus::kernels {
namespace {

CudaLatentSizes SizesOf(const LatentHeads& heads, int64_t tokens) {
  return {.tokens = tokens, .heads = heads.heads, .nope = heads.nope, .rope = heads.rope, .v = heads.v};
}

}  // namespace

template <typename T>
absl::Status PackLatentKv(CudaTag, Context& ctx, const LatentHeads& heads, ConstMatrixRef up,
                          ConstMatrixRef k_rope, MatrixRef kv) {
  using Cuda = CudaType<T>;
  const CudaPackLatentKvArgs<Cuda> args{.sizes = SizesOf(heads, up.rows),
                                        .up = static_cast<const Cuda*>(up.data),
                                        .k_rope = static_cast<const Cuda*>(k_rope.data),
                                        .kv = static_cast<Cuda*>(kv.data),
                                        .up_stride = up.stride,
                                        .rope_stride = k_rope.stride,
                                        .kv_stride = kv.stride};
  return CudaStatus("pack latent kv", CudaPackLatentKv(args, ctx.stream()));
}

template <typename From, typename T>
absl::Status UnpackLatentKvGradient(CudaTag, Context& ctx, const LatentHeads& heads, ConstMatrixRef dkv,
                                    MatrixRef dup, Write write, MatrixRef dk_rope) {
  const CudaUnpackLatentKvArgs<CudaType<From>, CudaType<T>> args{
      .sizes = SizesOf(heads, dup.rows),
      .dkv = static_cast<const CudaType<From>*>(dkv.data),
      .dup = static_cast<CudaType<T>*>(dup.data),
      .dk_rope = static_cast<float*>(dk_rope.data),
      .dkv_stride = dkv.stride,
      .dup_stride = dup.stride,
      .rope_stride = dk_rope.stride,
      .write = write == Write::kOverwrite ? LatentRopeWrite::kOverwrite : LatentRopeWrite::kAdd};
  return CudaStatus("unpack latent kv", CudaUnpackLatentKv(args, ctx.stream()));
}

template absl::Status PackLatentKv<float>(CudaTag, Context&, const LatentHeads&, ConstMatrixRef,
                                          ConstMatrixRef, MatrixRef);
template absl::Status PackLatentKv<BFloat16>(CudaTag, Context&, const LatentHeads&, ConstMatrixRef,
                                             ConstMatrixRef, MatrixRef);
#define ANNULUS_INSTANTIATE(From, T)                                                           \
  template absl::Status UnpackLatentKvGradient<From, T>(CudaTag, Context&, const LatentHeads&, \
                                                        ConstMatrixRef, MatrixRef, Write, MatrixRef)
ANNULUS_INSTANTIATE(float, float);
ANNULUS_INSTANTIATE(float, BFloat16);
ANNULUS_INSTANTIATE(BFloat16, BFloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
