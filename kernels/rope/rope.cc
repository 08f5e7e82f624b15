#include "annulus/ops/rope.h"

#include "kernels/common/arguments.h"
#include "kernels/rope/rope_kernels.h"

namespace annulus {

absl::Status Rope(Context& ctx, ConstTensorRef positions, const RopeFrequencies& frequencies,
                  RopeDirection direction, HeadsRef x, int64_t first) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckHeads(ctx, "rope.x", x));
  if (first < 0 || x.dim != first + 2 * frequencies.pairs()) {
    return Invalid("rope.head_dim=", x.dim, ": expected the ", first, " elements that stay and twice the ",
                   frequencies.pairs(), " pairs that turn");
  }
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "rope.positions", positions, DType::kI64, {x.rows}));
  return VisitKernel(ctx, x.dtype, [&]<class T>(auto device) {
    return kernels::Rope<T>(device, ctx, positions, frequencies, direction, x, first);
  });
}

}  // namespace annulus
