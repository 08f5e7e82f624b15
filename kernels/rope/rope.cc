#include "annulus/ops/rope.h"

#include "kernels/common/arguments.h"
#include "kernels/rope/rope_kernels.h"

namespace annulus {

absl::Status Rope(Context& ctx, absl::Span<const int64_t> positions, double theta, RopeDirection direction,
                  HeadsRef x) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeads("rope.x", x));
  if (x.dim % 2 != 0) return Invalid("rope.head_dim=", x.dim, ": expected an even number");
  if (!(theta > 0)) return Invalid("rope.theta=", theta, ": expected above 0");
  ANNULUS_RETURN_IF_ERROR(
      kernels::CheckCount("rope.positions.size", static_cast<int64_t>(positions.size()), x.rows));
  return VisitDevice(ctx, [&](auto device) {
    return VisitFloat(
        x.dtype, [&]<class T>() { return kernels::Rope<T>(device, ctx, positions, theta, direction, x); });
  });
}

}  // namespace annulus
