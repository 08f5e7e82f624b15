#include "reduce.h"

#include <algorithm>

namespace annulus {
namespace {

template <typename T>
void AccumulateTyped(ReduceOp op, const void* in, int64_t elements, void* acc) {
  const T* x = static_cast<const T*>(in);
  T* y = static_cast<T*>(acc);
  switch (op) {
    case ReduceOp::kSum:
      for (int64_t i = 0; i < elements; ++i) y[i] = static_cast<T>(y[i] + x[i]);
      return;
    case ReduceOp::kMax:
      for (int64_t i = 0; i < elements; ++i) y[i] = std::max(y[i], x[i]);
      return;
    case ReduceOp::kMin:
      for (int64_t i = 0; i < elements; ++i) y[i] = std::min(y[i], x[i]);
      return;
  }
}

}  // namespace

void Accumulate(DType dtype, ReduceOp op, const void* in, int64_t elements, void* acc) {
  switch (dtype) {
    case DType::kF32:
      return AccumulateTyped<float>(op, in, elements, acc);
    case DType::kF64:
      return AccumulateTyped<double>(op, in, elements, acc);
    case DType::kI32:
      return AccumulateTyped<int32_t>(op, in, elements, acc);
    case DType::kI64:
      return AccumulateTyped<int64_t>(op, in, elements, acc);
    case DType::kU8:
      return AccumulateTyped<uint8_t>(op, in, elements, acc);
  }
}

}  // namespace annulus
