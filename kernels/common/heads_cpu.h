#pragma once

// Elements and heads of CPU tensors.

#include <algorithm>

#include "annulus/device/context.h"
#include "annulus/ops/heads.h"

namespace annulus::kernels {

template <typename T>
T* ScratchElements(Context& ctx, int64_t elements) {
  return ctx.scratch.Allocate(DTypeOf<T>(), {elements}).template data<T>();
}

// state = elements [index * size, ...) of a tensor, or zero where that is undefined.
template <typename T>
void SetState(const ConstTensorRef& from, int64_t index, int64_t size, T* state) {
  if (from.defined()) {
    std::copy_n(from.data<T>() + index * size, size, state);
  } else {
    std::fill_n(state, size, T{0});
  }
}

// First element of head `head` of a row. T must match the dtype.
template <typename T, typename Byte>
auto* HeadAt(const BasicHeadsRef<Byte>& x, int64_t row, int64_t item, int64_t head) {
  return x.template At<T>(item, head) + row * x.row_stride;
}

// Calls fn(row, item, head) for every head of every token; polls between tiles of rows.
template <typename Fn>
void ForEachHead(const Context& ctx, const ConstHeadsRef& x, Fn&& fn) {
  constexpr int64_t kTileRows = 64;
  for (int64_t row = 0; row < x.rows; ++row) {
    if (row % kTileRows == 0) ctx.Poll();
    for (int64_t item = 0; item < x.batch; ++item) {
      for (int64_t head = 0; head < x.heads; ++head) fn(row, item, head);
    }
  }
}

}  // namespace annulus::kernels
