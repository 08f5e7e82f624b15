#pragma once

// Embedding lookup.

#include "annulus/base/status.h"
#include "annulus/device/context.h"

namespace annulus {

// y[t] = table[tokens[t]], 0 where the token is negative: its row is held by another rank.
//   tokens: i32 [tokens]   table: [vocab, d]   y: [tokens, d]
// OutOfRange names the first token of at least vocab; on GPUs the caller has checked them.
absl::Status EmbeddingForward(Context& ctx, ConstTensorRef tokens, ConstTensorRef table, TensorRef y);
// dtable[tokens[t]] += dy[t] where the token is not negative, the same bits on every run.   dtable:
// accumulator dtype
absl::Status EmbeddingBackward(Context& ctx, ConstTensorRef tokens, ConstTensorRef dy, TensorRef dtable);

}  // namespace annulus
