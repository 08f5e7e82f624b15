#pragma once

// The inside of a residual branch, y = x + mixer(RMSNorm(x)). SequenceMixer is the one open interface of the
// model: attention today; latent attention and state-space layers have the same shape. The MLP is the mixer
// that mixes nothing along the sequence.
//
// Tokens are ordered (row, batch item): tensors are [rows, batch, columns] with row = this rank's local row.

#include <map>
#include <memory>

#include "annulus/device/span_clock.h"
#include "annulus/model/params.h"
#include "annulus/model/spec.h"
#include "annulus/parallel/context_attention.h"

namespace annulus {

// How long attention with its exchange took, by what layers have in common: the window; and by pass.
class AttentionClocks {
 public:
  explicit AttentionClocks(Device device) : device_(device) {}
  SpanClock& Of(int64_t window, Pass pass) {
    return clocks_.try_emplace({window, pass}, device_).first->second;
  }

 private:
  Device device_;
  std::map<std::pair<int64_t, Pass>, SpanClock> clocks_;
};

// What all layers of one pass share.
struct ModelStep {
  AttentionGeometry& geometry;
  ExchangeStats stats;                // added to
  AttentionClocks* clocks = nullptr;  // null: nothing is timed
};

// Whether backward follows. Without it nothing is kept.
enum class Keep { kNothing, kForBackward };

class SequenceMixer {
 public:
  virtual ~SequenceMixer() = default;

  // y += mixer(x). With kForBackward keeps in ctx.saved what the recompute policy says; one forward is in
  // flight.
  virtual absl::Status Forward(Context& ctx, ModelStep& step, ConstTensorRef x, Keep keep, TensorRef y) = 0;

  // dx (overwritten) and parameter gradients (added to) from x as given to Forward and dy.
  virtual absl::Status Backward(Context& ctx, ModelStep& step, ConstTensorRef x, ConstTensorRef dy,
                                TensorRef dx) = 0;
};

// `layer` is the index in spec.layers; parameters are found in `params` by name.
std::unique_ptr<SequenceMixer> MakeAttention(const ModelSpec& spec, size_t layer, Recompute recompute,
                                             const ParamStore& params);
std::unique_ptr<SequenceMixer> MakeMlp(const ModelSpec& spec, size_t layer, Recompute recompute,
                                       const ParamStore& params);

}  // namespace annulus
