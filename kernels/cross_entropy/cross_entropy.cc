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

absl::Status CheckArguments(const Context& ctx, const LinearCrossEntropy& args, const TensorRef& loss) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckCompute(ctx, "cross_entropy.x", args.x));
  if (args.x.rank() != 2 || args.w.rank() != 2) {
    return Invalid("cross_entropy.x=", ToString(args.x.shape()), ", w=", ToString(args.w.shape()),
                   ": expected [tokens, d] and [vocab, d]");
  }
  const int64_t tokens = args.x.dim(0), d = args.x.dim(1), vocab = args.w.dim(0);
  if (d > kMaxColumns || vocab < 1 || vocab > kMaxColumns) {
    return Invalid("cross_entropy: d=", d, ", vocab=", vocab, ": expected a vocabulary and at most ",
                   kMaxColumns);
  }
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "cross_entropy.w", args.w, args.x.dtype(), {vocab, d}));
  ANNULUS_RETURN_IF_ERROR(
      kernels::CheckTensor(ctx, "cross_entropy.targets", args.targets, DType::kI32, {tokens}));
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "cross_entropy.loss", loss, DType::kF64, {1}));
  if (args.chunk_tokens < 1) {
    return Invalid("cross_entropy.chunk_tokens=", args.chunk_tokens, ": expected at least 1");
  }
  if (args.part.combine) return absl::OkStatus();  // targets may lie in any part
  return kernels::CheckTokens("cross_entropy.targets", args.targets, kLowestTarget, vocab);
}

absl::Status Dispatch(Context& ctx, const LinearCrossEntropy& args,
                      const LinearCrossEntropyGradients* gradients, TensorRef loss) {
  return VisitKernel(ctx, args.x.dtype(), [&]<class T>(auto device) {
    return kernels::LinearCrossEntropy<T>(device, ctx, args, gradients, loss);
  });
}

}  // namespace

absl::Status LinearCrossEntropyForward(Context& ctx, const LinearCrossEntropy& args, TensorRef loss) {
  ANNULUS_RETURN_IF_ERROR(CheckArguments(ctx, args, loss));
  return Dispatch(ctx, args, nullptr, loss);
}

absl::Status LinearCrossEntropyForwardBackward(Context& ctx, const LinearCrossEntropy& args,
                                               const LinearCrossEntropyGradients& gradients, TensorRef loss) {
  ANNULUS_RETURN_IF_ERROR(CheckArguments(ctx, args, loss));
  const DType dtype = args.x.dtype();
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "cross_entropy.dx", gradients.dx, dtype, args.x.shape()));
  ANNULUS_RETURN_IF_ERROR(
      kernels::CheckTensor(ctx, "cross_entropy.dw", gradients.dw, AccumOf(dtype), args.w.shape()));
  return Dispatch(ctx, args, &gradients, loss);
}

absl::Status MergeVocabularyStats(Context& ctx, ConstTensorRef parts, TensorRef stats) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckCompute(ctx, "cross_entropy.stats", stats));
  const DType dtype = stats.dtype();
  if (dtype != AccumOf(dtype) || stats.rank() != 2 || stats.dim(1) != 2) {
    return Invalid("cross_entropy.stats=", Name(dtype), ToString(stats.shape()),
                   ": expected [tokens, 2] in an accumulator dtype");
  }
  if (parts.rank() != 3 || parts.dim(0) < 1) {
    return Invalid("cross_entropy.parts=", ToString(parts.shape()), ": expected [parts, tokens, 2]");
  }
  ANNULUS_RETURN_IF_ERROR(
      kernels::CheckTensor(ctx, "cross_entropy.parts", parts, dtype, {parts.dim(0), stats.dim(0), 2}));
  return VisitDevice(ctx,
                     [&](auto device) { return kernels::MergeVocabularyStats(device, ctx, parts, stats); });
}

}  // namespace annulus
