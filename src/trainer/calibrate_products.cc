// Rates of matrix products of the shapes that expand latents into keys and values.

#include <algorithm>

#include "annulus/ops/elementwise.h"
#include "annulus/ops/linear.h"
#include "calibrate_kernels.h"

namespace annulus {
namespace {

// One expansion: latents [tokens, columns], up-projection [rows, columns].
struct ProductCase {
  DType dtype;
  int64_t rows, columns;
  std::vector<int64_t> tokens;
};

// On GPUs DeepSeek-V3's, 128 heads of 128 + 128; on CPUs 8 of 32 + 32.
ProductCase CaseFor(DeviceKind device) {
  if (device == DeviceKind::kCpu) return {DType::kF32, 512, 64, {32, 128, 512}};
  return {DType::kBF16, 32768, 512, {256, 1024, 4096, 16384}};
}

absl::StatusOr<RatePoint> MeasureRate(Context& ctx, Communicator& world, double flops,
                                      const std::function<absl::Status()>& call) {
  ANNULUS_ASSIGN_OR_RETURN(const double once, SecondsOf(ctx, world, {.warm_ups = 1, .timed = 1}, call));
  const int64_t calls = std::clamp<int64_t>(static_cast<int64_t>(0.002 / once), 1, 16);
  ANNULUS_ASSIGN_OR_RETURN(
      const double seconds,
      SecondsOf(ctx, world, {.warm_ups = 0, .timed = 5, .calls = calls, .take = StatisticFor(ctx)}, call));
  return RatePoint{.size = flops, .per_second = Rounded(flops / seconds)};
}

}  // namespace

absl::StatusOr<ProductRates> MeasureProducts(Context& ctx, Communicator world) {
  const ProductCase c = CaseFor(ctx.device.kind);
  const DType accum = AccumOf(c.dtype);
  ProductRates rates;
  for (const int64_t tokens : c.tokens) {
    ArenaScope scope(ctx.scratch);
    Arena& arena = ctx.scratch;
    const absl::StatusOr<TensorRef> latents = RandomTensor(ctx, arena, c.dtype, {tokens, c.columns}, 1),
                                    up = RandomTensor(ctx, arena, c.dtype, {c.rows, c.columns}, 2),
                                    gradient = RandomTensor(ctx, arena, c.dtype, {tokens, c.rows}, 3);
    for (const auto* made : {&latents, &up, &gradient})
      ANNULUS_RETURN_IF_ERROR(world.AgreeOk(made->status()));
    const TensorRef expanded = arena.Allocate(c.dtype, {tokens, c.rows});
    const TensorRef dlatents = arena.Allocate(accum, {tokens, c.columns}),
                    dup = arena.Allocate(accum, {c.rows, c.columns});
    for (const TensorRef& sum : {dlatents, dup}) ANNULUS_RETURN_IF_ERROR(Zero(ctx, sum));
    const double flops = 2.0 * static_cast<double>(tokens * c.rows * c.columns);
    ANNULUS_ASSIGN_OR_RETURN(const RatePoint forward, MeasureRate(ctx, world, flops, [&] {
                               return LinearForward(ctx, *latents, *up, Write::kOverwrite, expanded);
                             }));
    rates.forward.push_back(forward);
    ANNULUS_ASSIGN_OR_RETURN(
        const RatePoint gradients, MeasureRate(ctx, world, 2 * flops, [&] {
          ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, *gradient, *up, Write::kAccumulate, dlatents));
          return LinearBackwardWeight(ctx, *gradient, *latents, dup);
        }));
    rates.gradients.push_back(gradients);
  }
  return rates;
}

}  // namespace annulus
