#pragma once

// The feature map of BASED (Arora et al., 2024), the Taylor expansion of exp(q.k / sqrt(d)) to second order:
//   phi(x) = [1, x / d^(1/4), vec(x x^T) / (sqrt(2) sqrt(d))]      d -> 1 + d + d^2

#include "annulus/base/status.h"
#include "annulus/device/context.h"
#include "annulus/ops/heads.h"

namespace annulus {

inline int64_t TaylorFeatures(int64_t dim) { return 1 + dim + dim * dim; }

// x: [rows, batch, heads, d]   y: [rows, batch, heads, TaylorFeatures(d)], overwritten
absl::Status TaylorFeaturesForward(Context& ctx, ConstHeadsRef x, HeadsRef y);
absl::Status TaylorFeaturesBackward(Context& ctx, ConstHeadsRef x, ConstHeadsRef dy, HeadsRef dx);

// o = num / (den + eps): the normaliser of linear attention. num: heads of dim + 1 whose last column is den.
//   num: [rows, batch, heads, dim + 1]   o: [rows, batch, heads, dim]
absl::Status NormaliseForward(Context& ctx, ConstHeadsRef num, double eps, HeadsRef o);
absl::Status NormaliseBackward(Context& ctx, ConstHeadsRef num, double eps, ConstHeadsRef do_, HeadsRef dnum);
// y: x with a column of ones behind each head.   x: [.., dim]   y: [.., dim + 1]; and its adjoint.
absl::Status AppendOnes(Context& ctx, ConstHeadsRef x, HeadsRef y);
absl::Status DropLastColumn(Context& ctx, ConstHeadsRef y, HeadsRef x);

}  // namespace annulus
