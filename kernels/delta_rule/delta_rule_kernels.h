#pragma once

// Typed kernels of annulus/ops/delta_rule.h, one overload per device. Arguments are checked; T is that of q.

#include "annulus/ops/delta_rule.h"

namespace annulus::kernels {

template <typename T>
absl::Status DeltaSummary(CpuTag, Context& ctx, const DeltaRule& rule, const SegmentSummary& summary);
template <typename T>
absl::Status DeltaSummary(CudaTag, Context& ctx, const DeltaRule& rule, const SegmentSummary& summary);

template <typename T>
absl::Status DeltaForward(CpuTag, Context& ctx, const DeltaRule& rule, ConstTensorRef initial,
                          TensorRef states, HeadsRef o);
template <typename T>
absl::Status DeltaForward(CudaTag, Context& ctx, const DeltaRule& rule, ConstTensorRef initial,
                          TensorRef states, HeadsRef o);

template <typename T>
absl::Status DeltaBackwardSummary(CpuTag, Context& ctx, const DeltaRule& rule, ConstHeadsRef do_,
                                  const SegmentSummary& summary);
template <typename T>
absl::Status DeltaBackwardSummary(CudaTag, Context& ctx, const DeltaRule& rule, ConstHeadsRef do_,
                                  const SegmentSummary& summary);

struct DeltaBackwardInputs {
  ConstHeadsRef do_;
  ConstTensorRef states, final_gradient;  // final_gradient may be undefined
};
template <typename T>
absl::Status DeltaBackward(CpuTag, Context& ctx, const DeltaRule& rule, const DeltaBackwardInputs& in,
                           const DeltaGradients& out);
template <typename T>
absl::Status DeltaBackward(CudaTag, Context& ctx, const DeltaRule& rule, const DeltaBackwardInputs& in,
                           const DeltaGradients& out);

template <typename T>
absl::Status L2NormForward(CpuTag, Context& ctx, ConstHeadsRef x, double eps, HeadsRef y);
template <typename T>
absl::Status L2NormForward(CudaTag, Context& ctx, ConstHeadsRef x, double eps, HeadsRef y);
template <typename T>
absl::Status L2NormBackward(CpuTag, Context& ctx, ConstHeadsRef x, double eps, ConstHeadsRef dy, HeadsRef dx);
template <typename T>
absl::Status L2NormBackward(CudaTag, Context& ctx, ConstHeadsRef x, double eps, ConstHeadsRef dy,
                            HeadsRef dx);

}  // namespace annulus::kernels
