#pragma once

// Softmax attention of a sequence that is split over a context-parallel group: block kernels and the exchange
// of KV blocks, driven by an ExchangePlan. One rank is the plan without transfers.

#include <map>
#include <memory>

#include "annulus/comm/exchange_plan.h"
#include "annulus/comm/exchange_transport.h"
#include "annulus/ops/attention.h"
#include "annulus/parallel/attend_calls.h"
#include "annulus/parallel/mask.h"

namespace annulus {

// Everything about one batch of sequences that attention layers share: layout, masks and plans. Plans are
// built once per window; without documents they are the same for every batch and are kept across batches.
class AttentionGeometry {
 public:
  AttentionGeometry(SequenceLayout layout, Communicator cp, TransportKind transport = TransportKind::kHost)
      : layout_(layout), cp_(std::move(cp)), transport_kind_(transport) {}

  // Starts a new batch. Collective over cp when plans must be rebuilt.
  void SetBatch(SequenceBatch sequences);

  // One direction of the exchange with the kernel calls of its steps.
  struct Schedule {
    ExchangePlan plan;
    std::vector<std::vector<AttendCall>> calls;  // of this rank, by step
    bool whole = false;  // one call with all keys that this rank's queries see: nothing is carried or sent
  };
  struct Mask {
    BoundsTable bounds;  // of this rank's rows
    Schedule forward, backward;
    DeviceBounds on_device;
  };
  // The mask and plans for a window (0 = all keys); built, and agreed on by the group, at first use.
  absl::StatusOr<const Mask*> MaskFor(Context& ctx, int64_t window);

  const SequenceLayout& layout() const { return layout_; }
  const SequenceBatch& sequences() const { return sequences_; }
  Communicator& cp() { return cp_; }
  ConstTensorRef Positions(Context& ctx);                      // i64, global, of this rank's rows
  absl::StatusOr<ExchangeTransport*> Transport(Context& ctx);  // made at first use, collectively
  // Memory that the exchange keeps on the device.
  int64_t exchange_bytes() const { return transport_ == nullptr ? 0 : transport_->device_bytes(); }

 private:
  Schedule MakeSchedule(ExchangePlan plan, const BoundsTable& bounds) const;

  SequenceLayout layout_;
  Communicator cp_;
  TransportKind transport_kind_;
  std::unique_ptr<ExchangeTransport> transport_;
  SequenceBatch sequences_;
  Tensor positions_;
  std::map<int64_t, Mask> masks_;
  std::vector<DeviceBounds> spare_bounds_;  // of batches before: document masks change with every batch
};

struct ContextAttentionShape {
  int64_t heads = 0, kv_heads = 0;
  int64_t head_dim = 0;  // of queries and keys
  int64_t v_head_dim = 0;
  int64_t window = 0;
  double scale = 1.0;
};

// All tensors in the compute dtype but for lse, in the accumulator dtype. Results are overwritten.
//   q: [rows, batch, heads * head_dim]     kv: [rows, batch, kv_heads * (head_dim + v_head_dim)], keys first
//   out: [rows, batch, heads * v_head_dim]    lse: [rows, batch, heads]
struct ContextAttentionForwardArgs {
  TensorRef q, kv;
  TensorRef out, lse;
};
absl::Status ContextAttentionForward(Context& ctx, AttentionGeometry& geometry,
                                     const ContextAttentionShape& shape,
                                     const ContextAttentionForwardArgs& args, ExchangeStats* stats);

// out, lse: forward's results. dq, dkv: as q and kv.
struct ContextAttentionBackwardArgs {
  TensorRef q, kv, out, lse, dout;
  TensorRef dq, dkv;
};
absl::Status ContextAttentionBackward(Context& ctx, AttentionGeometry& geometry,
                                      const ContextAttentionShape& shape,
                                      const ContextAttentionBackwardArgs& args, ExchangeStats* stats);

}  // namespace annulus
