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

// A chunk of tokens whose logits lie in memory.
template <typename T>
struct Chunk {
  int64_t rows, vocab;
  const int32_t* targets;
  T* logits;  // [rows, vocab]
};

// Returns the loss of the chunk; logits become their gradient.
template <typename T>
double ChunkLoss(const Chunk<T>& chunk, double scale) {
  double sum = 0;
  for (int64_t t = 0; t < chunk.rows; ++t) {
    sum += TokenLoss(chunk.targets[t], scale, chunk.logits + t * chunk.vocab, chunk.vocab);
  }
  return sum;
}

// The same from a part of the vocabulary. Between its passes over the logits the stats of all parts are
// combined.
template <typename T>
absl::StatusOr<double> ChunkLossOfPart(Context& ctx, const Chunk<T>& chunk, const VocabularyPart& part,
                                       double scale) {
  ArenaScope scope(ctx.scratch);
  const TensorRef stats = ctx.scratch.Allocate(DTypeOf<T>(), {chunk.rows, 2});
  T* maximum = ctx.scratch.Allocate(DTypeOf<T>(), {chunk.rows}).template data<T>();
  T* stat = stats.data<T>();
  const auto target_of = [&](int64_t t) {
    const int64_t target = chunk.targets[t] - part.begin;
    return target < chunk.vocab ? target : -1;  // negative: in a part before, or not counted
  };
  for (int64_t t = 0; t < chunk.rows; ++t) {
    T* row = chunk.logits + t * chunk.vocab;
    const int64_t target = target_of(t);
    stat[2 * t + 1] = target >= 0 ? row[target] : T{0};
    const SumExp<T> total = Exponentiate(row, chunk.vocab);
    maximum[t] = total.maximum;
    stat[2 * t] = total.maximum + std::log(total.sum);
  }
  ANNULUS_RETURN_IF_ERROR(part.combine(stats));
  double sum = 0;
  for (int64_t t = 0; t < chunk.rows; ++t) {
    T* row = chunk.logits + t * chunk.vocab;
    if (chunk.targets[t] < 0) {
      std::fill_n(row, chunk.vocab, T{0});
      continue;
    }
    sum += static_cast<double>(stat[2 * t]) - static_cast<double>(stat[2 * t + 1]);
    const T factor = static_cast<T>(scale) * std::exp(maximum[t] - stat[2 * t]);
#pragma omp simd
    for (int64_t i = 0; i < chunk.vocab; ++i) row[i] *= factor;
    const int64_t target = target_of(t);
    if (target >= 0) row[target] -= static_cast<T>(scale);
  }
  return sum;
}

}  // namespace

template <typename T>
absl::Status LinearCrossEntropy(CpuTag, Context& ctx, const annulus::LinearCrossEntropy& args,
                                const LinearCrossEntropyGradients* gradients, TensorRef loss) {
  const int64_t tokens = args.x.dim(0), d = args.x.dim(1), vocab = args.w.dim(0);
  const int64_t chunk_rows = CpuLossChunkTokens(args.chunk_tokens, vocab);
  const double scale = gradients ? gradients->scale : 1.0;
  const T* w = args.w.data<T>();
  ArenaScope scope(ctx.scratch);
  T* logits = ctx.scratch.Allocate(args.x.dtype(), {std::min(chunk_rows, tokens), vocab}).template data<T>();
  double sum = 0;
  for (int64_t begin = 0; begin < tokens; begin += chunk_rows) {
    const int64_t rows = std::min(chunk_rows, tokens - begin);
    const Chunk<T> chunk{rows, vocab, args.targets.data<int32_t>() + begin, logits};
    const T* x = args.x.data<T>() + begin * d;
    T* dx = gradients ? gradients->dx.data<T>() + begin * d : nullptr;
    if (std::all_of(chunk.targets, chunk.targets + rows, [](int32_t target) { return target < 0; })) {
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
    if (args.part.combine) {
      ANNULUS_ASSIGN_OR_RETURN(const double of_chunk, ChunkLossOfPart(ctx, chunk, args.part, scale));
      sum += of_chunk;
    } else {
      sum += ChunkLoss(chunk, scale);
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

absl::Status MergeVocabularyStats(CpuTag, Context&, ConstTensorRef parts, TensorRef stats) {
  return VisitFloat(stats.dtype(), [&]<class T>() {
    const int64_t count = parts.dim(0), tokens = stats.dim(0);
    const T* from = parts.data<T>();
    for (int64_t t = 0; t < tokens; ++t) {
      const auto part = [&](int64_t p) { return from + 2 * (p * tokens + t); };
      T maximum = part(0)[0], sum = 0, target = 0;
      for (int64_t p = 1; p < count; ++p) maximum = std::max(maximum, part(p)[0]);
      for (int64_t p = 0; p < count; ++p) {
        sum += std::exp(part(p)[0] - maximum);
        target += part(p)[1];
      }
      stats.data<T>()[2 * t] = maximum + std::log(sum);
      stats.data<T>()[2 * t + 1] = target;
    }
    return absl::OkStatus();
  });
}

template absl::Status LinearCrossEntropy<float>(CpuTag, Context&, const annulus::LinearCrossEntropy&,
                                                const LinearCrossEntropyGradients*, TensorRef);
template absl::Status LinearCrossEntropy<double>(CpuTag, Context&, const annulus::LinearCrossEntropy&,
                                                 const LinearCrossEntropyGradients*, TensorRef);

}  // namespace annulus::kernels
