#include <algorithm>

#include "kernels/latent_kv/latent_kv_kernels.h"

namespace annulus::kernels {
namespace {

template <typename T>
const T* RowOf(const ConstMatrixRef& matrix, int64_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.stride;
}
template <typename T>
T* RowOf(const MatrixRef& matrix, int64_t row) {
  return static_cast<T*>(matrix.data) + row * matrix.stride;
}

}  // namespace

template <typename T>
absl::Status PackLatentKv(CpuTag, Context&, const LatentHeads& heads, ConstMatrixRef up,
                          ConstMatrixRef k_rope, MatrixRef kv) {
  for (int64_t t = 0; t < up.rows; ++t) {
    const T* from = RowOf<T>(up, t);
    const T* rope = RowOf<T>(k_rope, t);
    T* key = RowOf<T>(kv, t);
    T* value = key + heads.heads * heads.k_dim();
    for (int64_t h = 0; h < heads.heads; ++h) {
      key = std::copy_n(rope, heads.rope, std::copy_n(from, heads.nope, key));
      value = std::copy_n(from + heads.nope, heads.v, value);
      from += heads.nope + heads.v;
    }
  }
  return absl::OkStatus();
}

template <typename From, typename T>
absl::Status UnpackLatentKvGradient(CpuTag, Context&, const LatentHeads& heads, ConstMatrixRef dkv,
                                    MatrixRef dup, Write write, MatrixRef dk_rope) {
  for (int64_t t = 0; t < dup.rows; ++t) {
    const From* key = RowOf<From>(dkv, t);
    const From* value = key + heads.heads * heads.k_dim();
    T* to = RowOf<T>(dup, t);
    From* rope = RowOf<From>(dk_rope, t);
    if (write == Write::kOverwrite) std::fill_n(rope, heads.rope, From{0});
    for (int64_t h = 0; h < heads.heads; ++h) {
      to = std::copy_n(value, heads.v, std::copy_n(key, heads.nope, to));
      for (int64_t i = 0; i < heads.rope; ++i) rope[i] += key[heads.nope + i];
      key += heads.k_dim(), value += heads.v;
    }
  }
  return absl::OkStatus();
}

#define ANNULUS_INSTANTIATE(T)                                                                             \
  template absl::Status PackLatentKv<T>(CpuTag, Context&, const LatentHeads&, ConstMatrixRef,              \
                                        ConstMatrixRef, MatrixRef);                                        \
  template absl::Status UnpackLatentKvGradient<T, T>(CpuTag, Context&, const LatentHeads&, ConstMatrixRef, \
                                                     MatrixRef, Write, MatrixRef)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(double);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
