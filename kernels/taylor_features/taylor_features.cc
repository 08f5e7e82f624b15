#include "annulus/ops/taylor_features.h"

#include "kernels/common/arguments.h"
#include "kernels/taylor_features/taylor_features_kernels.h"

namespace annulus {
namespace {

ConstHeadsRef WithDim(ConstHeadsRef x, int64_t dim) {
  x.dim = dim;
  return x;
}

absl::Status CheckEps(double eps) {
  if (!(eps >= 0)) return Invalid("normalise.eps=", eps, ": expected at least 0");
  return absl::OkStatus();
}

// x: heads of dim   wide: heads of dim + 1
absl::Status CheckOneMore(const Context& ctx, absl::string_view x_name, const ConstHeadsRef& x,
                          absl::string_view wide_name, const ConstHeadsRef& wide) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeads(ctx, x_name, x));
  return kernels::CheckHeadsAs(wide_name, wide, WithDim(x, x.dim + 1));
}

}  // namespace

absl::Status TaylorFeaturesForward(Context& ctx, ConstHeadsRef x, HeadsRef y) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeads(ctx, "taylor_features.x", x));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("taylor_features.y", y, WithDim(x, TaylorFeatures(x.dim))));
  return VisitKernel(ctx, x.dtype, [&]<class T>(auto device) {
    return kernels::TaylorFeaturesForward<T>(device, ctx, x, y);
  });
}

absl::Status TaylorFeaturesBackward(Context& ctx, ConstHeadsRef x, ConstHeadsRef dy, HeadsRef dx) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeads(ctx, "taylor_features.x", x));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("taylor_features.dy", dy, WithDim(x, TaylorFeatures(x.dim))));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("taylor_features.dx", dx, x));
  return VisitKernel(ctx, x.dtype, [&]<class T>(auto device) {
    return kernels::TaylorFeaturesBackward<T>(device, ctx, x, dy, dx);
  });
}

absl::Status NormaliseForward(Context& ctx, ConstHeadsRef num, double eps, HeadsRef o) {
  ANNULUS_RETURN_IF_ERROR(CheckEps(eps));
  ANNULUS_RETURN_IF_ERROR(CheckOneMore(ctx, "normalise.o", o, "normalise.num", num));
  return VisitKernel(ctx, o.dtype, [&]<class T>(auto device) {
    return kernels::NormaliseForward<T>(device, ctx, num, eps, o);
  });
}

absl::Status NormaliseBackward(Context& ctx, ConstHeadsRef num, double eps, ConstHeadsRef do_,
                               HeadsRef dnum) {
  ANNULUS_RETURN_IF_ERROR(CheckEps(eps));
  ANNULUS_RETURN_IF_ERROR(CheckOneMore(ctx, "normalise.do", do_, "normalise.num", num));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeadsAs("normalise.dnum", dnum, num));
  return VisitKernel(ctx, num.dtype, [&]<class T>(auto device) {
    return kernels::NormaliseBackward<T>(device, ctx, num, eps, do_, dnum);
  });
}

absl::Status AppendOnes(Context& ctx, ConstHeadsRef x, HeadsRef y) {
  ANNULUS_RETURN_IF_ERROR(CheckOneMore(ctx, "append_ones.x", x, "append_ones.y", y));
  return VisitKernel(ctx, x.dtype,
                     [&]<class T>(auto device) { return kernels::AppendOnes<T>(device, ctx, x, y); });
}

absl::Status DropLastColumn(Context& ctx, ConstHeadsRef y, HeadsRef x) {
  ANNULUS_RETURN_IF_ERROR(CheckOneMore(ctx, "drop_last_column.x", x, "drop_last_column.y", y));
  return VisitKernel(ctx, x.dtype,
                     [&]<class T>(auto device) { return kernels::DropLastColumn<T>(device, ctx, y, x); });
}

}  // namespace annulus
