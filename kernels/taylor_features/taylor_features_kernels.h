#pragma once

// Typed kernels of annulus/ops/taylor_features.h, one overload per device. Arguments are checked.

#include "annulus/ops/taylor_features.h"

namespace annulus::kernels {

template <typename T>
absl::Status TaylorFeaturesForward(CpuTag, Context& ctx, ConstHeadsRef x, HeadsRef y);
template <typename T>
absl::Status TaylorFeaturesForward(CudaTag, Context& ctx, ConstHeadsRef x, HeadsRef y);
template <typename T>
absl::Status TaylorFeaturesBackward(CpuTag, Context& ctx, ConstHeadsRef x, ConstHeadsRef dy, HeadsRef dx);
template <typename T>
absl::Status TaylorFeaturesBackward(CudaTag, Context& ctx, ConstHeadsRef x, ConstHeadsRef dy, HeadsRef dx);

template <typename T>
absl::Status NormaliseForward(CpuTag, Context& ctx, ConstHeadsRef num, double eps, HeadsRef o);
template <typename T>
absl::Status NormaliseForward(CudaTag, Context& ctx, ConstHeadsRef num, double eps, HeadsRef o);
template <typename T>
absl::Status NormaliseBackward(CpuTag, Context& ctx, ConstHeadsRef num, double eps, ConstHeadsRef do_,
                               HeadsRef dnum);
template <typename T>
absl::Status NormaliseBackward(CudaTag, Context& ctx, ConstHeadsRef num, double eps, ConstHeadsRef do_,
                               HeadsRef dnum);

template <typename T>
absl::Status AppendOnes(CpuTag, Context& ctx, ConstHeadsRef x, HeadsRef y);
template <typename T>
absl::Status AppendOnes(CudaTag, Context& ctx, ConstHeadsRef x, HeadsRef y);
template <typename T>
absl::Status DropLastColumn(CpuTag, Context& ctx, ConstHeadsRef y, HeadsRef x);
template <typename T>
absl::Status DropLastColumn(CudaTag, Context& ctx, ConstHeadsRef y, HeadsRef x);

}  // namespace annulus::kernels
