#pragma once

// Softmax attention of a sequence that is split over a context-parallel group: block kernels and the exchange
// of KV blocks, driven by an ExchangePlan. One rank is the plan without transfers.

#include <map>
#include <memory>

#include "annulus/comm/exchange_plan.h"
#include "annulus/ops/attention.h"
#include "annulus/parallel/mask.h"

namespace annulus {

// Everything about one batch of sequences that attention layers share: layout, masks and plans. Plans are
// built once per window; without documents they are the same for every batch and are kept across batches.
class AttentionGeometry {
 public:
  AttentionGeometry(SequenceLayout layout, Communicator cp) : layout_(layout), cp_(std::move(cp)) {}

  // Starts a new batch. Collective over cp when plans must be rebuilt.
  void SetBatch(SequenceBatch sequences);

  struct Mask {
    BoundsTable bounds;  // of this rank's rows
    ExchangePlan forward, backward;
  };
  // The mask and plans for a window (0 = all keys); built, and agreed on by the group, at first use.
  absl::StatusOr<const Mask*> MaskFor(int64_t window);

  const SequenceLayout& layout() const { return layout_; }
  const SequenceBatch& sequences() const { return sequences_; }
  Communicator& cp() { return cp_; }
  absl::Span<const int64_t> positions() const { return positions_; }  // of this rank's rows

 private:
  SequenceLayout layout_;
  Communicator cp_;
  SequenceBatch sequences_;
  std::vector<int64_t> positions_;
  std::map<int64_t, Mask> masks_;
};

struct ContextAttentionShape {
  int64_t kv_heads = 0;
  int64_t head_dim = 0;  // of keys
  int64_t v_head_dim = 0;
  int64_t window = 0;
  double scale = 1.0;
};

// kv: [rows, batch, kv_heads * (head_dim + v_head_dim)], all keys first. partial is reset first.
absl::Status ContextAttentionForward(Context& ctx, AttentionGeometry& geometry,
                                     const ContextAttentionShape& shape, ConstHeadsRef q, TensorRef kv,
                                     const AttentionPartial& partial, ExchangeStats* stats);

// dq and dkv (laid out as kv) are in the accumulator dtype. dkv is overwritten; dq is added to.
struct ContextAttentionGradients {
  ConstHeadsRef out, dout;  // out: the normalised result, accumulator dtype; dout: compute dtype
  ConstTensorRef lse;
  HeadsRef dq;
  TensorRef dkv;
};
absl::Status ContextAttentionBackward(Context& ctx, AttentionGeometry& geometry,
                                      const ContextAttentionShape& shape, ConstHeadsRef q, TensorRef kv,
                                      const ContextAttentionGradients& gradients, ExchangeStats* stats);

}  // namespace annulus
