#pragma once

// RMSNorm over groups of columns with a gate:
//
//   kSiluBefore    y = w * RMS_group(x * silu(gate))      Mamba-2
//   kSiluAfter     y = w * RMS_group(x) * silu(gate)      gated DeltaNet
//   kSigmoidAfter  y = w * RMS_group(x) * sigmoid(gate)   lightning attention

#include <functional>

#include "annulus/base/status.h"
#include "annulus/device/context.h"
#include "annulus/ops/linear.h"

namespace annulus {

enum class Gate { kSiluBefore, kSiluAfter, kSigmoidAfter };

struct GatedNorm {
  ConstMatrixRef x, gate;  // [tokens, columns]
  ConstTensorRef w;        // [columns]; or [columns / groups], the same for all groups
  int64_t groups = 1;      // of columns, here
  double eps = 1e-5;
  Gate kind = Gate::kSiluBefore;
  // Where columns of a group are spread over ranks: their number there and here, and a call that sums a
  // tensor [tokens, n] of the accumulator dtype over them. Empty: all are here.
  int64_t group_columns = 0;
  std::function<absl::Status(TensorRef)> sum_over_ranks = {};
};

// y: [tokens, columns], overwritten
absl::Status GatedNormForward(Context& ctx, const GatedNorm& norm, MatrixRef y);
// dx, dgate are overwritten; dw (accumulator dtype) is added to.
absl::Status GatedNormBackward(Context& ctx, const GatedNorm& norm, ConstMatrixRef dy, MatrixRef dx,
                               MatrixRef dgate, TensorRef dw);

}  // namespace annulus
