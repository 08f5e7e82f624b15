#pragma once

// Typed kernels of annulus/ops/ssd.h, one overload per device. Arguments are checked; T is that of x.

#include "annulus/ops/ssd.h"

namespace annulus::kernels {

template <typename T>
absl::Status SsdChunkStates(CpuTag, Context& ctx, const Ssd& ssd, const SsdStates& states,
                            const SegmentSummary& summary);
template <typename T>
absl::Status SsdChunkStates(CudaTag, Context& ctx, const Ssd& ssd, const SsdStates& states,
                            const SegmentSummary& summary);

template <typename T>
absl::Status SsdForward(CpuTag, Context& ctx, const Ssd& ssd, ConstTensorRef initial, const SsdStates& states,
                        HeadsRef y);
template <typename T>
absl::Status SsdForward(CudaTag, Context& ctx, const Ssd& ssd, ConstTensorRef initial,
                        const SsdStates& states, HeadsRef y);

struct SsdBackwardStates {
  ConstHeadsRef dy;
  SsdStates states;
  TensorRef gradients;
};
template <typename T>
absl::Status SsdBackwardChunkStates(CpuTag, Context& ctx, const Ssd& ssd, const SsdBackwardStates& in,
                                    const SegmentSummary& summary);
template <typename T>
absl::Status SsdBackwardChunkStates(CudaTag, Context& ctx, const Ssd& ssd, const SsdBackwardStates& in,
                                    const SegmentSummary& summary);

// final_gradient may be undefined.
template <typename T>
absl::Status SsdBackward(CpuTag, Context& ctx, const Ssd& ssd, const SsdBackwardStates& in,
                         ConstTensorRef final_gradient, const SsdGradients& out);
template <typename T>
absl::Status SsdBackward(CudaTag, Context& ctx, const Ssd& ssd, const SsdBackwardStates& in,
                         ConstTensorRef final_gradient, const SsdGradients& out);

}  // namespace annulus::kernels
