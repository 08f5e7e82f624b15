#pragma once

// Embedding lookup.

#include "absl/types/span.h"
#include "annulus/base/status.h"
#include "annulus/device/context.h"

namespace annulus {

// y[t] = table[tokens[t]]   table: [vocab, d]   y: [tokens, d]
// OutOfRange names the first token outside [0, vocab).
absl::Status EmbeddingForward(Context& ctx, absl::Span<const int32_t> tokens, ConstTensorRef table,
                              TensorRef y);
// dtable[tokens[t]] += dy[t], in order of t.
absl::Status EmbeddingBackward(Context& ctx, absl::Span<const int32_t> tokens, ConstTensorRef dy,
                               TensorRef dtable);

}  // namespace annulus
