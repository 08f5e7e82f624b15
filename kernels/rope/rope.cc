#include "annulus/ops/rope.h"

#include "kernels/common/arguments.h"
#include "kernels/rope/rope_kernels.h"

namespace annulus {

absl::Status Rope(Context& ctx, ConstTensorRef positions, double theta, RopeDirection direction, HeadsRef x) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeads(ctx, "rope.x", x));
  if (x.dim % 2 != 0) return Invalid("rope.head_dim=", x.dim, ": expected an even number");
  if (!(theta > 0)) return Invalid("rope.theta=", theta, ": expected above 0");
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "rope.positions", positions, DType::kI64, {x.rows}));
  return VisitKernel(ctx, x.dtype, [&]<class T>(auto device) {
    return kernels::Rope<T>(device, ctx, positions, theta, direction, x);
  });
}

}  // namespace annulus
