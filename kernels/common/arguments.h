#pragma once

// Checks of op arguments, made once at the op's boundary. Messages name the argument, what it is and what was
// expected: "rms_norm.w=f32[3] on cpu: expected f32[4] on cpu".

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "annulus/base/status.h"
#include "annulus/device/context.h"
#include "annulus/ops/heads.h"
#include "annulus/ops/linear.h"

namespace annulus::kernels {

// Dtypes that the kernels of a device compute in: f32 and f64 on CPUs, f32 and bf16 on GPUs.
bool IsCompute(const Context& ctx, DType dtype);
absl::string_view ComputeNames(const Context& ctx);  // "f32 or f64"

// Of a compute dtype, on the context's device.
absl::Status CheckCompute(const Context& ctx, absl::string_view name, const ConstTensorRef& tensor);

// Exactly this dtype and shape, on the context's device.
absl::Status CheckTensor(const Context& ctx, absl::string_view name, const ConstTensorRef& tensor,
                         DType dtype, const Shape& shape);

// No negative counts, rows that do not overlap; with a context also of a compute dtype.
absl::Status CheckHeads(absl::string_view name, const ConstHeadsRef& heads);
absl::Status CheckHeads(const Context& ctx, absl::string_view name, const ConstHeadsRef& heads);

// Counts and dtype as those of `expected`, whose strides do not matter.
absl::Status CheckHeadsAs(absl::string_view name, const ConstHeadsRef& heads, const ConstHeadsRef& expected);

// Exactly this dtype and shape, rows that do not overlap.
absl::Status CheckMatrix(absl::string_view name, const ConstMatrixRef& matrix, DType dtype, int64_t rows,
                         int64_t cols);

// A count named `name` must be what another argument says it is.
absl::Status CheckCount(absl::string_view name, int64_t count, int64_t expected);

// OutOfRange naming the first token at or above `vocab`, or below `lowest`. Tokens on a GPU are not read: the
// caller has checked them before they went there.   tokens: i32
absl::Status CheckTokens(absl::string_view name, const ConstTensorRef& tokens, int64_t lowest, int64_t vocab);

}  // namespace annulus::kernels
