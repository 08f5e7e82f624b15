// Per chunk of tokens: logits by one product, then loss and in-place gradient row by row, then two products.

#include <algorithm>
#include <cmath>

#include "kernels/common/blas.h"
#include "kernels/common/vector_math.h"
#include "kernels/cross_entropy/cross_entropy_kernels.h"

namespace annulus::kernels {
namespace {

// Log-sum-exp with the maximum subtracted; afterwards logits[i] = exp(logits[i] - maximum).
template <typename T>
struct SumExp {
  T maximum, sum;
};

template <typename T>
SumExp<T> Exponentiate(T* logits, int64_t vocab) {
  T maximum = logits[0];
#pragma omp simd reduction(max : maximum)
  for (int64_t i = 0; i < vocab; ++i) maximum = std::max(maximum, logits[i]);
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < vocab; ++i) {
    logits[i] = Exp(logits[i] - maximum);
    sum += logits[i];
  }
  return {maximum, sum};
}

// Returns the loss of one token; the row becomes scale * (softmax - onehot), zeros where the token is not
// counted.
template <typename T>
double TokenLoss(int32_t target, double scale, T* row, int64_t vocab) {
  if (target < 0) {
    std::fill_n(row, vocab, T{0});
    return 0;
  }
  const double target_logit = static_cast<double>(row[target]);
  const SumExp<T> total = Exponentiate(row, vocab);
  const T factor = static_cast<T>(scale) / total.sum;
#pragma omp simd
  for (int64_t i = 0; i < vocab; ++i) row[i] *= factor;
  row[target] -= static_cast<T>(scale);
  return static_cast<double>(total.maximum) - target_logit + std::log(static_cast<double>(total.sum));
}

}  // namespace

template <typename T>
absl::Status LinearCrossEntropy(CpuTag, Context& ctx, const annulus::LinearCrossEntropy& args,
                                const LinearCrossEntropyGradients* gradients, TensorRef loss) {
  const int64_t tokens = args.x.dim(0), d = args.x.dim(1), vocab = args.w.dim(0);
  const int64_t chunk_rows = CpuLossChunkTokens(args.chunk_tokens, vocab);
  const T* w = args.w.data<T>();
  ArenaScope scope(ctx.scratch);
  T* logits = ctx.scratch.Allocate(args.x.dtype(), {std::min(chunk_rows, tokens), vocab}).template data<T>();
  double sum = 0;
  for (int64_t begin = 0; begin < tokens; begin += chunk_rows) {
    const int64_t rows = std::min(chunk_rows, tokens - begin);
    const int32_t* targets = args.targets.data<int32_t>() + begin;
    const T* x = args.x.data<T>() + begin * d;
    T* dx = gradients ? gradients->dx.data<T>() + begin * d : nullptr;
    if (std::all_of(targets, targets + rows, [](int32_t target) { return target < 0; })) {
      if (gradients) std::fill_n(dx, rows * d, T{0});
      continue;
    }
    Gemm<T>({.m = rows,
             .n = vocab,
             .k = d,
             .a = {x, d},
             .b = {w, d, Transpose::kYes},
             .beta = 0,
             .c = logits,
             .c_stride = vocab});
    ctx.Poll();
    for (int64_t t = 0; t < rows; ++t) {
      sum += TokenLoss(targets[t], gradients ? gradients->scale : 1.0, logits + t * vocab, vocab);
    }
    if (gradients) {
      ctx.Poll();
      Gemm<T>({.m = vocab,
               .n = d,
               .k = rows,
               .a = {logits, vocab, Transpose::kYes},
               .b = {x, d},
               .beta = 1,
               .c = gradients->dw.data<T>(),
               .c_stride = d});
      ctx.Poll();
      Gemm<T>({.m = rows,
               .n = d,
               .k = vocab,
               .a = {logits, vocab},
               .b = {w, d},
               .beta = 0,
               .c = dx,
               .c_stride = d});
    }
    ctx.Poll();
  }
  *loss.data<double>() += sum;
  return absl::OkStatus();
}

template absl::Status LinearCrossEntropy<float>(CpuTag, Context&, const annulus::LinearCrossEntropy&,
                                                const LinearCrossEntropyGradients*, TensorRef);
template absl::Status LinearCrossEntropy<double>(CpuTag, Context&, const annulus::LinearCrossEntropy&,
                                                 const LinearCrossEntropyGradients*, TensorRef);

}  // namespace annulus::kernels
