#include "annulus/ops/embedding.h"

#include "kernels/common/arguments.h"
#include "kernels/embedding/embedding_kernels.h"

namespace annulus {
namespace {

// table: [vocab, d]   rows: [tokens, d]
absl::Status CheckEmbedding(const Context& ctx, absl::Span<const int32_t> tokens, const ConstTensorRef& table,
                            const ConstTensorRef& rows) {
  ANNULUS_RETURN_IF_ERROR(kernels::CheckFloat(ctx, "embedding.table", table));
  if (table.rank() != 2) return Invalid("embedding.table=", ToString(table.shape()), ": expected [vocab, d]");
  const Shape expected{static_cast<int64_t>(tokens.size()), table.dim(1)};
  ANNULUS_RETURN_IF_ERROR(kernels::CheckTensor(ctx, "embedding.y", rows, table.dtype(), expected));
  return kernels::CheckTokens("embedding.tokens", tokens, 0, table.dim(0));
}

}  // namespace

absl::Status EmbeddingForward(Context& ctx, absl::Span<const int32_t> tokens, ConstTensorRef table,
                              TensorRef y) {
  ANNULUS_RETURN_IF_ERROR(CheckEmbedding(ctx, tokens, table, y));
  return VisitDevice(ctx, [&](auto device) {
    return VisitFloat(y.dtype(),
                      [&]<class T>() { return kernels::EmbeddingForward<T>(device, tokens, table, y); });
  });
}

absl::Status EmbeddingBackward(Context& ctx, absl::Span<const int32_t> tokens, ConstTensorRef dy,
                               TensorRef dtable) {
  ANNULUS_RETURN_IF_ERROR(CheckEmbedding(ctx, tokens, dtable, dy));
  return VisitDevice(ctx, [&](auto device) {
    return VisitFloat(dy.dtype(),
                      [&]<class T>() { return kernels::EmbeddingBackward<T>(device, tokens, dy, dtable); });
  });
}

}  // namespace annulus
