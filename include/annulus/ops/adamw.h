#pragma once

// AdamW (Loshchilov and Hutter, 2019), decoupled weight decay, bias-corrected.
//   m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2        g = gradient_scale * gradient
//   p -= lr (m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps) + weight_decay p)

#include "annulus/base/status.h"
#include "annulus/device/context.h"

namespace annulus {

struct AdamWHyper {
  double lr = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0;
  int64_t step = 1;  // 1 for the first update
};

struct AdamWTensors {
  TensorRef param, m, v;  // [n] f32 or f64
  ConstTensorRef grad;    // [n] of the same dtype
  // f64 [1], for clipping. Where it is NaN nothing is changed: a step whose loss or norm is not finite.
  ConstTensorRef gradient_scale;
  TensorRef copy;  // [n] of a compute dtype: the new param, rounded. Undefined: not wanted
};

absl::Status AdamWUpdate(Context& ctx, const AdamWHyper& hyper, const AdamWTensors& tensors);

}  // namespace annulus
