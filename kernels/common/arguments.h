#pragma once

// Checks of op arguments, made once at the op's boundary. Messages name the argument, what it is and what was
// expected: "rms_norm.w=f32[3]: expected f32[4] on cpu".

#include "absl/strings/string_view.h"
#include "annulus/base/status.h"
#include "annulus/device/context.h"
#include "annulus/ops/heads.h"

namespace annulus::kernels {

// f32 or f64, on the context's device.
absl::Status CheckFloat(const Context& ctx, absl::string_view name, const ConstTensorRef& tensor);

// Exactly this dtype and shape, on the context's device.
absl::Status CheckTensor(const Context& ctx, absl::string_view name, const ConstTensorRef& tensor,
                         DType dtype, const Shape& shape);

// f32 or f64, no negative counts, rows that do not overlap.
absl::Status CheckHeads(absl::string_view name, const ConstHeadsRef& heads);

// A count named `name` must be what another argument says it is.
absl::Status CheckCount(absl::string_view name, int64_t count, int64_t expected);

// OutOfRange naming the first token at or above `vocab`, or below `lowest`.
absl::Status CheckTokens(absl::string_view name, absl::Span<const int32_t> tokens, int64_t lowest,
                         int64_t vocab);

}  // namespace annulus::kernels
