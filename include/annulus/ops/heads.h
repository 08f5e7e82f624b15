#pragma once

// Erased view of [rows, batch, heads, dim] with free strides between rows and between batch items, so that K
// and V that share a buffer, or one item of a batch, need no copy. Heads and dim are contiguous.

#include "annulus/device/tensor.h"

namespace annulus {

template <typename Byte>
struct BasicHeadsRef {
  Byte* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0, batch = 0, heads = 0, dim = 0;
  int64_t row_stride = 0, batch_stride = 0;  // elements

  operator BasicHeadsRef<const void>() const {
    return {data, dtype, rows, batch, heads, dim, row_stride, batch_stride};
  }
  // Rows [begin, end).
  BasicHeadsRef Rows(int64_t begin, int64_t end) const {
    ANNULUS_CHECK(0 <= begin && begin <= end && end <= rows)
        << "rows [" << begin << ", " << end << ") of " << rows;
    BasicHeadsRef part = *this;
    part.data = Offset(begin * row_stride);
    part.rows = end - begin;
    return part;
  }
  // Pointer to head `head` of the first row of batch item `item`; T must match dtype.
  template <typename T>
  auto* At(int64_t item, int64_t head) const {
    using Pointee = std::conditional_t<std::is_const_v<Byte>, const T, T>;
    ANNULUS_CHECK(dtype == DTypeOf<T>()) << "heads are " << Name(dtype);
    return static_cast<Pointee*>(Offset(item * batch_stride + head * dim));
  }

 private:
  Byte* Offset(int64_t elements) const {
    using Char = std::conditional_t<std::is_const_v<Byte>, const char, char>;
    return static_cast<Char*>(data) + elements * SizeOf(dtype);
  }
};
using HeadsRef = BasicHeadsRef<void>;
using ConstHeadsRef = BasicHeadsRef<const void>;

// Columns [first, first + heads * dim) of a tensor [rows, batch, columns] as heads.
template <typename Byte>
BasicHeadsRef<Byte> HeadsOf(const BasicTensorRef<Byte>& t, int64_t first, int64_t heads, int64_t dim) {
  ANNULUS_CHECK(t.rank() == 3 && first + heads * dim <= t.dim(2)) << ToString(t.shape());
  using Char = std::conditional_t<std::is_const_v<Byte>, const char, char>;
  return {static_cast<Char*>(t.raw()) + first * SizeOf(t.dtype()),
          t.dtype(),
          t.dim(0),
          t.dim(1),
          heads,
          dim,
          t.dim(1) * t.dim(2),
          t.dim(2)};
}

}  // namespace annulus
