#pragma once

// What every op test needs: buffers with guard elements around them, random contents, strided views, the
// tolerance rule, and gradients by finite differences.
//
//   Guarded<T> y({tokens, d});                       // NaN inside, guards outside, checked when it goes
//   ANNULUS_CHECK_OK(SomeOp(ctx, x.ref(), y.ref()));
//   ExpectMatches<T>(y.values(), [&]<class W>() { return reference::SomeOp<W>(Cast<W>(x.values())); });

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "annulus/base/random.h"
#include "annulus/base/status.h"
#include "annulus/device/context.h"
#include "annulus/ops/heads.h"
#include "annulus/ops/linear.h"

namespace annulus::testing {

using FloatTypes = ::testing::Types<float, double>;

// The next wider type: what a kernel in T is judged by.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, float>, double, long double>;

template <typename To, typename From>
std::vector<To> Cast(const std::vector<From>& values) {
  return std::vector<To>(values.begin(), values.end());
}

template <typename T>
std::vector<T> NormalValues(int64_t n, absl::string_view stream, double scale = 1) {
  const RandomStream random(7, stream);
  std::vector<T> values(static_cast<size_t>(n));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<T>(scale * random.Normal(i));
  return values;
}

// A tensor between guard elements, which the destructor compares.
template <typename T>
class Guarded {
 public:
  // Poisoned: an op that overwrites must not read it, and must reach all of it.
  explicit Guarded(const Shape& shape, T fill = std::numeric_limits<T>::quiet_NaN()) : shape_(shape) {
    buffer_.assign(static_cast<size_t>(shape.elements() + 2 * kGuards), kGuardValue);
    std::fill_n(data(), shape.elements(), fill);
  }
  Guarded(const Shape& shape, const std::vector<T>& values) : Guarded(shape) { Set(values); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    const auto guard = [](T x) { return x == kGuardValue; };
    EXPECT_TRUE(std::all_of(buffer_.begin(), buffer_.begin() + kGuards, guard))
        << "written before the tensor";
    EXPECT_TRUE(std::all_of(buffer_.end() - kGuards, buffer_.end(), guard)) << "written past the tensor";
  }

  T* data() { return buffer_.data() + kGuards; }
  TensorRef ref() { return {data(), DTypeOf<T>(), Device{}, shape_}; }
  std::vector<T> values() const { return {buffer_.begin() + kGuards, buffer_.end() - kGuards}; }
  void Set(const std::vector<T>& values) {
    ANNULUS_CHECK(static_cast<int64_t>(values.size()) == shape_.elements());
    std::copy(values.begin(), values.end(), data());
  }

 private:
  static constexpr int64_t kGuards = 64;
  static constexpr T kGuardValue = T{-12345};

  Shape shape_;
  std::vector<T> buffer_;
};

constexpr int kPaddingValue = -777;

// Rows of `stride` elements hold the padding value outside columns [begin, end).
template <typename T>
void ExpectPadding(const std::vector<T>& values, int64_t stride, int64_t begin, int64_t end) {
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t column = static_cast<int64_t>(i) % stride;
    if (begin <= column && column < end) continue;
    ASSERT_EQ(values[i], T{kPaddingValue}) << "element " << i << " between the rows";
  }
}

// A matrix with a few columns between its rows, which the destructor compares.
template <typename T>
class StridedMatrix {
 public:
  StridedMatrix(int64_t rows, int64_t cols, int64_t padding, const std::vector<T>& values)
      : rows_(rows), cols_(cols), stride_(cols + padding), buffer_({rows, stride_}, kPadding) {
    for (int64_t i = 0; i < rows * cols; ++i) buffer_.data()[Offset(i)] = values[static_cast<size_t>(i)];
  }
  ~StridedMatrix() { ExpectPadding(buffer_.values(), stride_, 0, cols_); }
  MatrixRef ref() { return {buffer_.data(), DTypeOf<T>(), rows_, cols_, stride_}; }
  std::vector<T> values() {
    std::vector<T> values;
    for (int64_t i = 0; i < rows_ * cols_; ++i) values.push_back(buffer_.data()[Offset(i)]);
    return values;
  }

 private:
  static constexpr T kPadding = T{kPaddingValue};
  int64_t Offset(int64_t i) const { return i / cols_ * stride_ + i % cols_; }

  int64_t rows_, cols_, stride_;
  Guarded<T> buffer_;
};

enum class BatchOrder { kInsideRows, kOutsideRows };

// Heads inside wider columns, in either order of rows and batch items. What lies around them is compared at
// the end.
template <typename T>
class StridedHeads {
 public:
  struct Dims {
    int64_t rows = 0, batch = 0, heads = 0, dim = 0;
    int64_t elements() const { return rows * batch * heads * dim; }
  };

  StridedHeads(const Dims& dims, BatchOrder order, const std::vector<T>& values)
      : dims_(dims),
        columns_(dims.heads * dims.dim + kBefore + kAfter),
        order_(order),
        buffer_({dims.rows * dims.batch, columns_}, kPadding) {
    Set(values);
  }
  ~StridedHeads() { ExpectPadding(buffer_.values(), columns_, kBefore, kBefore + dims_.heads * dims_.dim); }
  HeadsRef ref() {
    const bool inside = order_ == BatchOrder::kInsideRows;
    return {buffer_.data() + kBefore,
            DTypeOf<T>(),
            dims_.rows,
            dims_.batch,
            dims_.heads,
            dims_.dim,
            inside ? dims_.batch * columns_ : columns_,
            inside ? columns_ : dims_.rows * columns_};
  }
  // Dense [rows, batch, heads, dim].
  std::vector<T> values() {
    std::vector<T> values;
    ForEach([&](T& element, int64_t) { values.push_back(element); });
    return values;
  }
  void Set(const std::vector<T>& values) {
    ANNULUS_CHECK(static_cast<int64_t>(values.size()) == dims_.elements());
    ForEach([&](T& element, int64_t i) { element = values[static_cast<size_t>(i)]; });
  }

 private:
  static constexpr T kPadding = T{kPaddingValue};
  static constexpr int64_t kBefore = 3, kAfter = 5;

  template <typename Fn>
  void ForEach(Fn&& fn) {
    const int64_t width = dims_.heads * dims_.dim;
    const HeadsRef heads = ref();
    for (int64_t i = 0; i < dims_.elements(); ++i) {
      const int64_t row = i / width / dims_.batch, item = i / width % dims_.batch;
      fn(buffer_.data()[kBefore + row * heads.row_stride + item * heads.batch_stride + i % width], i);
    }
  }

  Dims dims_;
  int64_t columns_;
  BatchOrder order_;
  Guarded<T> buffer_;
};

template <typename A, typename B>
double MaxDifference(const std::vector<A>& a, const std::vector<B>& b) {
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isfinite(b[i])) worst = std::max(worst, std::abs(static_cast<double>(a[i] - b[i])));
  }
  return worst;
}

template <typename T>
double MaxAbs(const std::vector<T>& values) {
  double worst = 0;
  for (const T x : values) {
    if (std::isfinite(x)) worst = std::max(worst, std::abs(static_cast<double>(x)));
  }
  return worst;
}

// NaN and infinities sit at the same places; the rest obeys
//   max |got - wide| <= 2 max |naive - wide| + 4 epsilon operand_norm
// where naive and wide are the reference in T and in the next wider type. operand_norm bounds what is summed
// into an output; left out, it is the largest output. The four epsilons: a naive result may by luck be exact.
template <typename T>
void ExpectMatches(const std::vector<T>& got, const std::vector<T>& naive, const std::vector<Wide<T>>& wide,
                   double operand_norm = 0) {
  ASSERT_EQ(got.size(), wide.size());
  ASSERT_EQ(naive.size(), wide.size());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(std::isnan(got[i]), std::isnan(wide[i])) << "at " << i;
    if (std::isinf(wide[i]) || std::isinf(got[i])) {
      ASSERT_EQ(got[i], static_cast<T>(wide[i])) << "at " << i;
    }
  }
  const double norm = std::max(operand_norm, MaxAbs(wide));
  const double atol = 4 * static_cast<double>(std::numeric_limits<T>::epsilon()) * norm;
  EXPECT_LE(MaxDifference(got, wide), 2 * MaxDifference(naive, wide) + atol);
}

// The same for a reference that is a template lambda on the type it computes in.
template <typename T, typename Reference>
void ExpectMatches(const std::vector<T>& got, const Reference& reference, double operand_norm = 0) {
  ExpectMatches<T>(got, reference.template operator()<T>(), reference.template operator()<Wide<T>>(),
                   operand_norm);
}

template <typename T>
bool SameBits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Compares `gradient` with five-point central differences of `objective` in the elements of `input`, relative
// to the largest gradient. The stencil's own error is about h^4 = 1e-12 and epsilon / h = 1e-13.
inline void ExpectGradient(const std::function<double()>& objective, double* input,
                           const std::vector<double>& gradient) {
  constexpr double kStep = 1e-3;
  const double scale = MaxAbs(gradient);
  ASSERT_GT(scale, 0) << "a gradient of zero checks nothing";
  for (size_t i = 0; i < gradient.size(); ++i) {
    const double center = input[i];
    const auto at = [&](double offset) {
      input[i] = center + offset;
      return objective();
    };
    const double near = at(kStep) - at(-kStep), far = at(2 * kStep) - at(-2 * kStep);
    input[i] = center;
    ASSERT_NEAR((8 * near - far) / (12 * kStep), gradient[i], 1e-7 * scale) << "element " << i;
  }
}

inline double Dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// The status refuses and its message holds `text`.
inline void ExpectRefused(const absl::Status& status, absl::StatusCode code, absl::string_view text) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_NE(status.message().find(text), absl::string_view::npos) << status << "\nexpected: " << text;
}

}  // namespace annulus::testing
