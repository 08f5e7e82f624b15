#include "annulus/ops/cross_entropy.h"

#include <limits>

#include "kernels/common/arguments.h"
#include "kernels/cross_entropy/cross_entropy_kernels.h"

namespace annulus {
namespace {

// Tokens without a target are negative.
constexpr int64_t kLowestTarget = std::numeric_limits<int32_t>::min();
// BLAS libraries count columns in 32 bits.
constexpr int64_t kMaxColumns = std::numeric_limits<int32_t>::max();

absl::Status CheckArguments(const Context& ctx, const LinearCrossEntropy& args) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckFloat(ctx, "cross_entropy.x", args.x));
  if (args.x.rank() != 2 || args.w.rank() != 2) {
    return Invalid("cross_entropy.x=", ToString(args.x.shape()), ", w=", ToString(args.w.shape()),
                   ": expected [tokens, d] and [vocab, d]");
  }
  const int64_t d = args.x.dim(1), vocab = args.w.dim(0);
  if (d > kMaxColumns || vocab < 1 || vocab > kMaxColumns) {
    return Invalid("cross_entropy: d=", d, ", vocab=", vocab, ": expected a vocabulary and at most ",
                   kMaxColumns);
  }
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "cross_entropy.w", args.w, args.x.dtype(), {vocab, d}));
  const auto targets = static_cast<int64_t>(args.targets.size());
  ANNULUS_RETURN_IF_ERROR(kernels::CheckCount("cross_entropy.targets.size", targets, args.x.dim(0)));
  if (args.chunk_tokens < 1) {
    return Invalid("cross_entropy.chunk_tokens=", args.chunk_tokens, ": expected at least 1");
  }
  return kernels::CheckTokens("cross_entropy.targets", args.targets, kLowestTarget, vocab);
}

absl::StatusOr<double> Dispatch(Context& ctx, const LinearCrossEntropy& args,
                                const kernels::LossGradients* gradients) {
  return VisitDevice(ctx, [&](auto device) {
    return VisitFloat(args.x.dtype(), [&]<class T>() {
      return kernels::LinearCrossEntropy<T>(device, ctx, args, gradients);
    });
  });
}

}  // namespace

absl::StatusOr<double> LinearCrossEntropyForward(Context& ctx, const LinearCrossEntropy& args) {
  ANNULUS_RETURN_IF_ERROR(CheckArguments(ctx, args));
  return Dispatch(ctx, args, nullptr);
}

absl::StatusOr<double> LinearCrossEntropyForwardBackward(Context& ctx, const LinearCrossEntropy& args,
                                                         double scale, TensorRef dx, TensorRef dw) {
  ANNULUS_RETURN_IF_ERROR(CheckArguments(ctx, args));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "cross_entropy.dx", dx, args.x.dtype(), args.x.shape()));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "cross_entropy.dw", dw, args.x.dtype(), args.w.shape()));
  const kernels::LossGradients gradients{.scale = scale, .dx = dx, .dw = dw};
  return Dispatch(ctx, args, &gradients);
}

}  // namespace annulus
