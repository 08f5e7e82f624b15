#pragma once

// Views of memory that somebody else owns.
//   View<T, Rank>   typed and strided, trivially copyable, usable in kernels
//   TensorRef       erased: pointer, dtype, device, shape; always contiguous (row-major)
// Sizes and strides count elements, never bytes.

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "absl/types/span.h"
#include "annulus/base/dtype.h"
#include "annulus/device/device.h"

namespace annulus {

inline constexpr int kMaxRank = 4;

class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) : Shape(absl::Span<const int64_t>(dims.begin(), dims.size())) {}
  explicit Shape(absl::Span<const int64_t> dims);

  int rank() const { return rank_; }
  int64_t operator[](int i) const { return dims_[static_cast<size_t>(i)]; }
  int64_t elements() const;  // 1 for rank 0
  absl::Span<const int64_t> dims() const { return {dims_.data(), static_cast<size_t>(rank_)}; }
  friend bool operator==(const Shape& a, const Shape& b) { return a.dims() == b.dims(); }

 private:
  std::array<int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};

std::string ToString(const Shape& shape);  // "[2, 3]"

template <typename T, int Rank>
struct View {
  T* data = nullptr;
  std::array<int64_t, Rank> size{};
  std::array<int64_t, Rank> stride{};

  template <typename... Index>
  T& operator()(Index... index) const {
    static_assert(sizeof...(Index) == Rank);
    const std::array<int64_t, Rank> i{static_cast<int64_t>(index)...};
    int64_t offset = 0;
    for (int d = 0; d < Rank; ++d) offset += i[static_cast<size_t>(d)] * stride[static_cast<size_t>(d)];
    return data[offset];
  }
};

template <typename Byte>
class BasicTensorRef {
 public:
  BasicTensorRef() = default;
  BasicTensorRef(Byte* data, DType dtype, Device device, Shape shape)
      : data_(data), dtype_(dtype), device_(device), shape_(shape) {}
  // A mutable ref converts to a const one.
  operator BasicTensorRef<const void>() const { return {data_, dtype_, device_, shape_}; }

  Byte* raw() const { return data_; }
  DType dtype() const { return dtype_; }
  Device device() const { return device_; }
  const Shape& shape() const { return shape_; }
  int64_t dim(int i) const { return shape_[i]; }
  int rank() const { return shape_.rank(); }
  int64_t elements() const { return shape_.elements(); }
  int64_t bytes() const { return elements() * SizeOf(dtype_); }
  bool defined() const { return data_ != nullptr; }

  // Typed pointer to the first element; T must match dtype().
  template <typename T>
  auto* data() const {
    using Pointee = std::conditional_t<std::is_const_v<Byte>, const T, T>;
    ANNULUS_CHECK(dtype_ == DTypeOf<T>()) << "tensor is " << Name(dtype_);
    return static_cast<Pointee*>(data_);
  }

  // Typed row-major view of all dims.
  template <typename T, int Rank>
  auto view() const {
    using Pointee = std::conditional_t<std::is_const_v<Byte>, const T, T>;
    ANNULUS_CHECK(rank() == Rank) << "tensor " << ToString(shape_);
    View<Pointee, Rank> v;
    v.data = data<T>();
    int64_t stride = 1;
    for (int d = Rank - 1; d >= 0; --d) {
      v.size[static_cast<size_t>(d)] = shape_[d];
      v.stride[static_cast<size_t>(d)] = stride;
      stride *= shape_[d];
    }
    return v;
  }

  // The same elements under another shape.
  BasicTensorRef Reshaped(Shape shape) const {
    ANNULUS_CHECK(shape.elements() == elements()) << ToString(shape_) << " -> " << ToString(shape);
    return {data_, dtype_, device_, shape};
  }
  // Rows [begin, end) of the first dimension.
  BasicTensorRef Rows(int64_t begin, int64_t end) const {
    ANNULUS_CHECK(rank() >= 1 && 0 <= begin && begin <= end && end <= shape_[0])
        << "rows [" << begin << ", " << end << ") of " << ToString(shape_);
    std::array<int64_t, kMaxRank> dims{};
    int64_t row_elements = 1;
    for (int d = 0; d < rank(); ++d) {
      dims[static_cast<size_t>(d)] = d == 0 ? end - begin : shape_[d];
      if (d > 0) row_elements *= shape_[d];
    }
    using Char = std::conditional_t<std::is_const_v<Byte>, const char, char>;
    return {static_cast<Char*>(data_) + begin * row_elements * SizeOf(dtype_), dtype_, device_,
            Shape(absl::Span<const int64_t>(dims.data(), static_cast<size_t>(rank())))};
  }

 private:
  Byte* data_ = nullptr;
  DType dtype_ = DType::kF32;
  Device device_;
  Shape shape_;
};

using TensorRef = BasicTensorRef<void>;
using ConstTensorRef = BasicTensorRef<const void>;

}  // namespace annulus
