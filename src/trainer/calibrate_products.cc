// Rates of matrix products. At each size several shapes: of a model's width both ways, and of latents that
// are expanded into keys and values.

#include <algorithm>

#include "annulus/ops/elementwise.h"
#include "annulus/ops/linear.h"
#include "calibrate_kernels.h"

namespace annulus {
namespace {

// Of as many elements each, so that at as many tokens all are of one size.
struct Weight {
  int64_t out, in;
};
struct ProductCases {
  DType dtype;
  std::vector<Weight> weights;
  std::vector<int64_t> tokens;
};
ProductCases CasesFor(DeviceKind device) {
  if (device == DeviceKind::kCpu)
    return {DType::kF32, {{512, 64}, {128, 256}, {256, 128}}, {32, 128, 512, 2048, 8192}};
  return {DType::kBF16, {{32768, 512}, {4096, 4096}, {2048, 8192}}, {64, 256, 1024, 4096, 16384}};
}

struct Seconds {
  double forward = 0, gradients = 0;
};

absl::StatusOr<Seconds> MeasureProduct(Context& ctx, Communicator& world, DType dtype, Weight weight,
                                       int64_t tokens) {
  ArenaScope scope(ctx.scratch);
  Arena& arena = ctx.scratch;
  const auto x = RandomTensor(ctx, arena, dtype, {tokens, weight.in}, 1);
  const auto w = RandomTensor(ctx, arena, dtype, {weight.out, weight.in}, 2);
  const auto dy = RandomTensor(ctx, arena, dtype, {tokens, weight.out}, 3);
  for (const auto* made : {&x, &w, &dy}) ANNULUS_RETURN_IF_ERROR(world.AgreeOk(made->status()));
  const TensorRef y = arena.Allocate(dtype, dy->shape()), dx = arena.Allocate(dtype, x->shape());
  const TensorRef dw = arena.Allocate(AccumOf(dtype), w->shape());
  ANNULUS_RETURN_IF_ERROR(Zero(ctx, dw));
  ANNULUS_ASSIGN_OR_RETURN(const RatePoint forward, MeasureRate(ctx, world, 1, [&] {
                             return LinearForward(ctx, *x, *w, Write::kOverwrite, y);
                           }));
  ANNULUS_ASSIGN_OR_RETURN(
      const RatePoint gradients, MeasureRate(ctx, world, 1, [&] {
        ANNULUS_RETURN_IF_ERROR(LinearBackwardInput(ctx, *dy, *w, Write::kOverwrite, dx));
        return LinearBackwardWeight(ctx, *dy, *x, dw);
      }));
  return Seconds{1 / forward.per_second, 1 / gradients.per_second};
}

}  // namespace

absl::StatusOr<ProductRates> MeasureProducts(Context& ctx, Communicator world, CalibrationClock& clock) {
  const ProductCases c = CasesFor(ctx.device.kind);
  ProductRates rates;
  for (const int64_t tokens : c.tokens) {
    if (!rates.forward.empty()) {
      ANNULUS_ASSIGN_OR_RETURN(const bool over, clock.Over());
      if (over) break;
    }
    Seconds all;
    for (const Weight& weight : c.weights) {
      ANNULUS_ASSIGN_OR_RETURN(const Seconds of, MeasureProduct(ctx, world, c.dtype, weight, tokens));
      all.forward += of.forward, all.gradients += of.gradients;
    }
    const double flops = 2.0 * static_cast<double>(tokens * c.weights[0].out * c.weights[0].in);
    const double count = static_cast<double>(c.weights.size());
    rates.forward.push_back({flops, Rounded(count * flops / all.forward)});
    rates.gradients.push_back({2 * flops, Rounded(2 * count * flops / all.gradients)});
  }
  return rates;
}

}  // namespace annulus
