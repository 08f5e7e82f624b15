#include <cmath>

#include "kernels/common/blas.h"
#include "kernels/state/state_kernels.h"

namespace annulus::kernels {
namespace {

template <typename T>
void ScaleAndAdd(T factor, const T* in, const T* state, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = factor * in[i] + state[i];
}

template <typename T>
void AdvanceAll(Context& ctx, const ConstTensorRef& transition, Transpose transpose, const ConstTensorRef& in,
                const ConstTensorRef& state, const TensorRef& out) {
  const int64_t count = state.dim(0) * state.dim(1), k = state.dim(2), v = state.dim(3);
  const bool matrices = transition.rank() == 3;
  ArenaScope scope(ctx.scratch);
  T* product = ctx.scratch.Allocate(out.dtype(), {matrices ? k * v : 0}).template data<T>();
  for (int64_t i = 0; i < count; ++i) {
    const T* from = in.data<T>() + i * k * v;
    const T* add = state.data<T>() + i * k * v;
    T* to = out.data<T>() + i * k * v;
    if (!matrices) {
      ScaleAndAdd(transition.data<T>()[i], from, add, k * v, to);
    } else {  // out may be in
      Gemm<T>({.m = k,
               .n = v,
               .k = k,
               .a = {transition.data<T>() + i * k * k, k, transpose},
               .b = {from, v},
               .beta = 0,
               .c = product,
               .c_stride = v});
      ScaleAndAdd(T{1}, product, add, k * v, to);
    }
    ctx.Poll();
  }
}

template <typename T>
void ComposeAll(Context& ctx, const ConstTensorRef& later, const ConstTensorRef& earlier,
                const TensorRef& out) {
  const int64_t count = out.dim(0) * out.dim(1);
  if (out.rank() == 2) {
    for (int64_t i = 0; i < count; ++i) out.data<T>()[i] = later.data<T>()[i] * earlier.data<T>()[i];
    return;
  }
  const int64_t k = std::llround(std::sqrt(static_cast<double>(out.dim(2))));
  for (int64_t i = 0; i < count; ++i) {
    Gemm<T>({.m = k,
             .n = k,
             .k = k,
             .a = {later.data<T>() + i * k * k, k},
             .b = {earlier.data<T>() + i * k * k, k},
             .beta = 0,
             .c = out.data<T>() + i * k * k,
             .c_stride = k});
    ctx.Poll();
  }
}

}  // namespace

absl::Status AdvanceState(CpuTag, Context& ctx, ConstTensorRef transition, Transpose transpose,
                          ConstTensorRef in, ConstTensorRef state, TensorRef out) {
  VisitFloat(out.dtype(), [&]<class T>() {
    if (in.defined()) {
      AdvanceAll<T>(ctx, transition, transpose, in, state, out);
    } else if (out.raw() != state.raw()) {
      std::copy_n(state.data<T>(), state.elements(), out.data<T>());
    }
  });
  return absl::OkStatus();
}

absl::Status ComposeTransitions(CpuTag, Context& ctx, ConstTensorRef later, ConstTensorRef earlier,
                                TensorRef out) {
  VisitFloat(out.dtype(), [&]<class T>() { ComposeAll<T>(ctx, later, earlier, out); });
  return absl::OkStatus();
}

}  // namespace annulus::kernels
