#pragma once

// Typed kernels of annulus/ops/attention.h, one overload per device. Arguments are checked.

#include "annulus/ops/attention_arrival.h"
#include "kernels/attention/tensor_core_dims.h"

namespace annulus::kernels {

AttentionKernelCase KernelCaseOf(const Context& ctx, const AttentionBlock& block, Pass pass);
AttentionKernel KernelFor(const Context& ctx, const AttentionBlock& block, Pass pass);

absl::Status ResetPartial(CpuTag, Context& ctx, const AttentionPartial& partial);
absl::Status FinishPartial(CpuTag, Context& ctx, const AttentionPartial& partial);
template <typename T>
absl::Status MergePartials(CpuTag, Context& ctx, const PartialMerge& merge);
template <typename T>
absl::Status AttentionForward(CpuTag, Context& ctx, const AttentionBlock& block,
                              const AttentionPartial& partial);
template <typename T>
absl::Status AttentionForwardWhole(CpuTag, Context& ctx, const AttentionBlock& block, HeadsRef out,
                                   TensorRef lse);
template <typename T>
absl::Status AttentionDelta(CpuTag, Context& ctx, ConstHeadsRef out, ConstHeadsRef dout, TensorRef delta);
template <typename T>
absl::Status AttentionBackward(CpuTag, Context& ctx, const AttentionBlock& block,
                               const AttentionGradients& gradients);
template <typename T>
absl::Status AttentionBackwardWhole(CpuTag, Context& ctx, const AttentionBlock& block,
                                    const AttentionGradients& gradients);

absl::Status AttentionForwardArriving(CudaTag, Context& ctx, const ArrivingAttention& attention, HeadsRef out,
                                      TensorRef lse);

absl::Status ResetPartial(CudaTag, Context& ctx, const AttentionPartial& partial);
template <typename T>  // of merge.out
absl::Status MergePartials(CudaTag, Context& ctx, const PartialMerge& merge);
template <typename T>
absl::Status AttentionForward(CudaTag, Context& ctx, const AttentionBlock& block,
                              const AttentionPartial& partial);
template <typename T>
absl::Status AttentionForwardWhole(CudaTag, Context& ctx, const AttentionBlock& block, HeadsRef out,
                                   TensorRef lse);
template <typename T>
absl::Status AttentionDelta(CudaTag, Context& ctx, ConstHeadsRef out, ConstHeadsRef dout, TensorRef delta);
template <typename T>
absl::Status AttentionBackward(CudaTag, Context& ctx, const AttentionBlock& block,
                               const AttentionGradients& gradients);
template <typename T>
absl::Status AttentionBackwardWhole(CudaTag, Context& ctx, const AttentionBlock& block,
                                    const AttentionGradients& gradients);

}  // namespace annulus::kernels
