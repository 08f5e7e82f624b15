#include "annulus/ops/embedding.h"

#include <limits>

#include "kernels/common/arguments.h"
#include "kernels/embedding/embedding_kernels.h"

namespace annulus {
namespace {

// Tokens whose rows another rank holds are negative.
constexpr int64_t kLowestToken = std::numeric_limits<int32_t>::min();

struct Expected {
  ConstTensorRef tokens;  // [tokens]
  ConstTensorRef table;   // [vocab, d]
  DType table_dtype;
  absl::string_view rows_name;
  ConstTensorRef rows;  // [tokens, d]
};

absl::Status CheckEmbedding(const Context& ctx, absl::string_view table_name, const Expected& e) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckCompute(ctx, e.rows_name, e.rows));
  if (e.table.rank() != 2)
    return Invalid(table_name, "=", ToString(e.table.shape()), ": expected [vocab, d]");
  const int64_t vocab = e.table.dim(0), d = e.table.dim(1);
  if (e.tokens.rank() != 1) {
    return Invalid("embedding.tokens=", ToString(e.tokens.shape()), ": expected [tokens]");
  }
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, table_name, e.table, e.table_dtype, {vocab, d}));
  ANNULUS_RETURN_IF_ERROR(
      kernels::CheckTensor(ctx, "embedding.tokens", e.tokens, DType::kI32, e.tokens.shape()));
  ANNULUS_RETURN_IF_ERROR(
      kernels::CheckTensor(ctx, e.rows_name, e.rows, e.rows.dtype(), {e.tokens.dim(0), d}));
  return kernels::CheckTokens("embedding.tokens", e.tokens, kLowestToken, vocab);
}

}  // namespace

absl::Status EmbeddingForward(Context& ctx, ConstTensorRef tokens, ConstTensorRef table, TensorRef y) {
  ANNULUS_RETURN_IF_ERROR(
      CheckEmbedding(ctx, "embedding.table", {tokens, table, y.dtype(), "embedding.y", y}));
  return VisitKernel(ctx, y.dtype(), [&]<class T>(auto device) {
    return kernels::EmbeddingForward<T>(device, ctx, tokens, table, y);
  });
}

absl::Status EmbeddingBackward(Context& ctx, ConstTensorRef tokens, ConstTensorRef dy, TensorRef dtable) {
  ANNULUS_RETURN_IF_ERROR(
      CheckEmbedding(ctx, "embedding.dtable", {tokens, dtable, AccumOf(dy.dtype()), "embedding.dy", dy}));
  return VisitKernel(ctx, dy.dtype(), [&]<class T>(auto device) {
    return kernels::EmbeddingBackward<T>(device, ctx, tokens, dy, dtable);
  });
}

}  // namespace annulus
