#include "kernels/common/recurrent_cuda.h"
#include "kernels/taylor_features/taylor_features_cuda.h"
#include "kernels/taylor_features/taylor_features_kernels.h"

namespace annulus::kernels {

template <typename T>
absl::Status TaylorFeaturesForward(CudaTag, Context& ctx, ConstHeadsRef x, HeadsRef y) {
  return CudaStatus("taylor_features forward",
                    CudaTaylorForward(ShapeOf(x), x.dim, HeadRows<T>(x), HeadRows<T>(y), ctx.stream()));
}

template <typename T>
absl::Status TaylorFeaturesBackward(CudaTag, Context& ctx, ConstHeadsRef x, ConstHeadsRef dy, HeadsRef dx) {
  return CudaStatus(
      "taylor_features backward",
      CudaTaylorBackward(ShapeOf(x), x.dim, HeadRows<T>(x), HeadRows<T>(dy), HeadRows<T>(dx), ctx.stream()));
}

template <typename T>
absl::Status NormaliseForward(CudaTag, Context& ctx, ConstHeadsRef num, double eps, HeadsRef o) {
  return CudaStatus("normalise forward",
                    CudaNormaliseForward(ShapeOf(o), o.dim, HeadRows<T>(num), static_cast<float>(eps),
                                         HeadRows<T>(o), ctx.stream()));
}

template <typename T>
absl::Status NormaliseBackward(CudaTag, Context& ctx, ConstHeadsRef num, double eps, ConstHeadsRef do_,
                               HeadsRef dnum) {
  return CudaStatus("normalise backward",
                    CudaNormaliseBackward(ShapeOf(do_), do_.dim, HeadRows<T>(num), static_cast<float>(eps),
                                          HeadRows<T>(do_), HeadRows<T>(dnum), ctx.stream()));
}

template <typename T>
absl::Status AppendOnes(CudaTag, Context& ctx, ConstHeadsRef x, HeadsRef y) {
  return CudaStatus("append_ones",
                    CudaCopyHeads(ShapeOf(x), x.dim, HeadRows<T>(x), y.dim, HeadRows<T>(y), ctx.stream()));
}

template <typename T>
absl::Status DropLastColumn(CudaTag, Context& ctx, ConstHeadsRef y, HeadsRef x) {
  return CudaStatus("drop_last_column",
                    CudaCopyHeads(ShapeOf(x), y.dim, HeadRows<T>(y), x.dim, HeadRows<T>(x), ctx.stream()));
}

#define ANNULUS_INSTANTIATE(T)                                                                        \
  template absl::Status TaylorFeaturesForward<T>(CudaTag, Context&, ConstHeadsRef, HeadsRef);         \
  template absl::Status TaylorFeaturesBackward<T>(CudaTag, Context&, ConstHeadsRef, ConstHeadsRef,    \
                                                  HeadsRef);                                          \
  template absl::Status NormaliseForward<T>(CudaTag, Context&, ConstHeadsRef, double, HeadsRef);      \
  template absl::Status NormaliseBackward<T>(CudaTag, Context&, ConstHeadsRef, double, ConstHeadsRef, \
                                             HeadsRef);                                               \
  template absl::Status AppendOnes<T>(CudaTag, Context&, ConstHeadsRef, HeadsRef);                    \
  template absl::Status DropLastColumn<T>(CudaTag, Context&, ConstHeadsRef, HeadsRef)
ANNULUS_INSTANTIATE(float);
ANNULUS_INSTANTIATE(BFloat16);
#undef ANNULUS_INSTANTIATE

}  // namespace annulus::kernels
