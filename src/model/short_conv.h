#pragma once

// The short causal convolutions of state-space layers on the first columns of a projection, over a sequence
// that is split over ranks. Between ranks go the last k - 1 rows of each segment before the convolution:
// those rows are projected first, so that they travel while everything else is projected.

#include <functional>
#include <optional>
#include <vector>

#include "annulus/model/mixer.h"
#include "annulus/ops/conv1d.h"
#include "annulus/parallel/state_passing.h"

namespace annulus {

// Parameters of consecutive channels.
struct ConvPart {
  TensorRef w, dw;        // [channels, k]
  TensorRef bias, dbias;  // [channels]; undefined: none
  int64_t channels() const { return w.dim(0); }
};

class ShortConv {
 public:
  ShortConv() = default;
  explicit ShortConv(std::vector<ConvPart> parts);

  int64_t channels() const { return channels_; }
  // [segments, k - 1, batch, channels]: the rows before each segment. Kept from forward.
  TensorRef AllocateHalo(Arena& arena, ModelStep& step, DType dtype) const;

  // `project` writes columns [0, channels) of the projection of rows of x.   x: [rows * batch, d]
  using Projection = std::function<absl::Status(ConstTensorRef x, MatrixRef to)>;
  // Halos on their way; nothing of what this allocates in ctx.scratch may be released before Finish.
  absl::StatusOr<HaloExchange> StartHalo(Context& ctx, ModelStep& step, ConstTensorRef x,
                                         const Projection& project, TensorRef halo) const;

  // out = silu(conv(columns [0, channels) of proj)).   proj: [rows, batch, >= channels]   out: [rows, batch,
  // channels]
  absl::Status Forward(Context& ctx, ModelStep& step, TensorRef proj, TensorRef halo, TensorRef out) const;
  // Those columns of dproj are overwritten; gradients of the parameters are added to. `meanwhile` runs while
  // gradients of halos travel.
  using Meanwhile = std::function<absl::Status()>;
  absl::Status Backward(Context& ctx, ModelStep& step, TensorRef proj, TensorRef halo, TensorRef dout,
                        const Meanwhile& meanwhile, TensorRef dproj) const;

 private:
  Conv1d ConvOf(Context& ctx, ModelStep& step, const ConvPart& part, ConstTensorRef halo) const;
  absl::StatusOr<TensorRef> HaloOf(Context& ctx, TensorRef halo, int64_t begin, const ConvPart& part) const;
  absl::Status AddHaloGradients(Context& ctx, ModelStep& step, TensorRef dhalo, const Meanwhile& meanwhile,
                                TensorRef dproj) const;

  std::vector<ConvPart> parts_;
  int64_t channels_ = 0, width_ = 0;  // width: k - 1
};

}  // namespace annulus
