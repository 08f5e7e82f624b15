#include "kernels/common/arguments.h"

namespace annulus::kernels {

bool IsCompute(const Context& ctx, DType dtype) {
  return dtype == DType::kF32 || dtype == (ctx.device.kind == DeviceKind::kCpu ? DType::kF64 : DType::kBF16);
}

absl::string_view ComputeNames(const Context& ctx) {
  return ctx.device.kind == DeviceKind::kCpu ? "f32 or f64" : "f32 or bf16";
}

absl::Status CheckCompute(const Context& ctx, absl::string_view name, const ConstTensorRef& tensor) {
  if (!IsCompute(ctx, tensor.dtype())) {
    return Invalid(name, "=", Name(tensor.dtype()), ToString(tensor.shape()), ": expected ",
                   ComputeNames(ctx));
  }
  if (!(tensor.device() == ctx.device)) {
    return Invalid(name, " is on ", ToString(tensor.device()), ": expected ", ToString(ctx.device));
  }
  return absl::OkStatus();
}

absl::Status CheckTensor(const Context& ctx, absl::string_view name, const ConstTensorRef& tensor,
                         DType dtype, const Shape& shape) {
  if (tensor.dtype() != dtype || !(tensor.shape() == shape) || !(tensor.device() == ctx.device)) {
    return Invalid(name, "=", Name(tensor.dtype()), ToString(tensor.shape()), " on ",
                   ToString(tensor.device()), ": expected ", Name(dtype), ToString(shape), " on ",
                   ToString(ctx.device));
  }
  return absl::OkStatus();
}

absl::Status CheckHeads(absl::string_view name, const ConstHeadsRef& x) {
  if (x.rows < 0 || x.batch < 0 || x.heads < 0 || x.dim < 0) {
    return Invalid(name, "=[", x.rows, ", ", x.batch, ", ", x.heads, ", ", x.dim,
                   "]: expected counts from 0");
  }
  if (x.rows == 0 || x.batch == 0) return absl::OkStatus();  // strides mean nothing
  if (x.rows > 1 && x.row_stride < x.heads * x.dim) {
    return Invalid(name, ".row_stride=", x.row_stride, ": expected at least ", x.heads * x.dim, " elements");
  }
  if (x.batch > 1 && x.batch_stride < x.heads * x.dim) {
    return Invalid(name, ".batch_stride=", x.batch_stride, ": expected at least ", x.heads * x.dim,
                   " elements");
  }
  return absl::OkStatus();
}

absl::Status CheckHeads(const Context& ctx, absl::string_view name, const ConstHeadsRef& x) {
  if (!IsCompute(ctx, x.dtype)) {
    return Invalid(name, ".dtype=", Name(x.dtype), ": expected ", ComputeNames(ctx));
  }
  return CheckHeads(name, x);
}

absl::Status CheckHeadsAs(absl::string_view name, const ConstHeadsRef& x, const ConstHeadsRef& expected) {
  if (x.dtype != expected.dtype || x.rows != expected.rows || x.batch != expected.batch ||
      x.heads != expected.heads || x.dim != expected.dim) {
    return Invalid(name, "=", Name(x.dtype), "[", x.rows, ", ", x.batch, ", ", x.heads, ", ", x.dim,
                   "]: expected ", Name(expected.dtype), "[", expected.rows, ", ", expected.batch, ", ",
                   expected.heads, ", ", expected.dim, "]");
  }
  return CheckHeads(name, x);
}

absl::Status CheckMatrix(absl::string_view name, const ConstMatrixRef& m, DType dtype, int64_t rows,
                         int64_t cols) {
  if (m.dtype != dtype || m.rows != rows || m.cols != cols || (m.rows > 1 && m.stride < m.cols)) {
    return Invalid(name, "=", Name(m.dtype), "[", m.rows, ", ", m.cols, "] with stride ", m.stride,
                   ": expected ", Name(dtype), "[", rows, ", ", cols, "]");
  }
  return absl::OkStatus();
}

absl::Status CheckCount(absl::string_view name, int64_t count, int64_t expected) {
  if (count != expected) return Invalid(name, "=", count, ": expected ", expected);
  return absl::OkStatus();
}

absl::Status CheckTokens(absl::string_view name, const ConstTensorRef& tokens, int64_t lowest,
                         int64_t vocab) {
  if (tokens.device().kind != DeviceKind::kCpu) return absl::OkStatus();
  const auto* token = tokens.data<int32_t>();
  for (int64_t t = 0; t < tokens.elements(); ++t) {
    if (token[t] < lowest || token[t] >= vocab) {
      return absl::OutOfRangeError(absl::StrCat(name, "[", t, "]=", token[t],
                                                ": expected a token below the vocabulary of ", vocab,
                                                lowest == 0 ? " and at least 0" : ""));
    }
  }
  return absl::OkStatus();
}

}  // namespace annulus::kernels
