#include "reduce.h"

#include <algorithm>

namespace annulus {
namespace {

// Of the partial result that is kept near while operands are gone through: 8 KiB of f64, a quarter of a
// level-1 cache.
constexpr int64_t kBlockElements = 1024;

template <typename T>
struct Carry {
  using Type = T;
  static T Load(T x) { return x; }
  static T Store(T x) { return x; }
};
template <>
struct Carry<BFloat16> {
  using Type = float;
  static float Load(BFloat16 x) { return ToFloat(x); }
  static BFloat16 Store(float x) { return ToBFloat16(x); }
};

template <typename T, typename Combine>
void ReduceWith(const Combine& combine, absl::Span<const void* const> operands, int64_t elements, void* out) {
  typename Carry<T>::Type carry[kBlockElements];
  for (int64_t begin = 0; begin < elements; begin += kBlockElements) {
    const int64_t count = std::min(kBlockElements, elements - begin);
    const T* first = static_cast<const T*>(operands[0]) + begin;
    for (int64_t i = 0; i < count; ++i) carry[i] = Carry<T>::Load(first[i]);
    for (size_t r = 1; r < operands.size(); ++r) {
      const T* x = static_cast<const T*>(operands[r]) + begin;
      for (int64_t i = 0; i < count; ++i) carry[i] = combine(carry[i], Carry<T>::Load(x[i]));
    }
    T* y = static_cast<T*>(out) + begin;
    for (int64_t i = 0; i < count; ++i) y[i] = Carry<T>::Store(carry[i]);
  }
}

template <typename T>
void ReduceTyped(ReduceOp op, absl::Span<const void* const> operands, int64_t elements, void* out) {
  using C = typename Carry<T>::Type;
  switch (op) {
    case ReduceOp::kSum:
      return ReduceWith<T>([](C a, C b) { return static_cast<C>(a + b); }, operands, elements, out);
    case ReduceOp::kMax:
      return ReduceWith<T>([](C a, C b) { return std::max(a, b); }, operands, elements, out);
    case ReduceOp::kMin:
      return ReduceWith<T>([](C a, C b) { return std::min(a, b); }, operands, elements, out);
  }
}

}  // namespace

void Reduce(DType dtype, ReduceOp op, absl::Span<const void* const> operands, int64_t elements, void* out) {
  switch (dtype) {
    case DType::kF32:
      return ReduceTyped<float>(op, operands, elements, out);
    case DType::kF64:
      return ReduceTyped<double>(op, operands, elements, out);
    case DType::kBF16:
      return ReduceTyped<BFloat16>(op, operands, elements, out);
    case DType::kI32:
      return ReduceTyped<int32_t>(op, operands, elements, out);
    case DType::kI64:
      return ReduceTyped<int64_t>(op, operands, elements, out);
    case DType::kU8:
      return ReduceTyped<uint8_t>(op, operands, elements, out);
  }
}

void Accumulate(DType dtype, ReduceOp op, const void* in, int64_t elements, void* acc) {
  Reduce(dtype, op, {acc, in}, elements, acc);
}

}  // namespace annulus
