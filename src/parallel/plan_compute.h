#pragma once

// The computing steps of a plan on an attention layer's tensors: kernel calls on slots, and rows of heads
// moved and added between them.

#include "annulus/comm/exchange_transport.h"
#include "annulus/ops/attention.h"
#include "annulus/parallel/attention_geometry.h"
#include "annulus/parallel/choose_plan.h"

namespace annulus {

// A result for which kernels carry in the accumulator dtype: the rows of the result itself, or of scratch
// memory in its place, which Finish rounds into it.
class Accumulator {
 public:
  // For rows of `rows`: ascending and apart.
  Accumulator(Context& ctx, TensorRef result, std::vector<RowRange> rows);

  TensorRef Rows(const RowRange& rows) const;  // a part of one of the ranges
  absl::Status Zero();
  absl::Status Finish();

 private:
  Context& ctx_;
  TensorRef result_;
  std::vector<RowRange> rows_;
  TensorRef memory_;
  int64_t offset_ = 0;  // row of the result at which memory_ begins
};

// Keys and values of a group of heads, or their gradients: [rows, batch, heads * (head_dim + v_head_dim)],
// keys first.
struct KvRows {
  TensorRef kv;
  int64_t heads = 0;
  int64_t first = 0;  // the row of the slot that is the first of kv
};

// The call's operands: queries of the one tensor, keys of the other, both with the heads of the group.
//   q: [rows, batch, heads * head_dim]
AttentionBlock BlockOf(const AttendCall& call, const DeviceBounds& bounds, const AttentionCase& layer,
                       double scale, const HeadGroup& group, TensorRef q, const KvRows& kv);

// In rows `rows` of the slot.
struct KvHeads {
  HeadsRef k, v;
};
KvHeads SplitKv(const AttentionCase& layer, const KvRows& kv, const RowRange& rows);

// How kernels that take keys as they come know of them.
struct KeyWaits {
  ExchangeTransport* transport;
  int64_t patience_ms;
};

// One run of one rank's part of a plan.
class PlanCompute {
 public:
  // `schedule` and `slots` outlive it. latent: where the layer has latents.
  PlanCompute(Context& ctx, const AttentionGeometry::Schedule& schedule, double scale, int cp_rank,
              const std::vector<SlotMemory>& slots, const LatentWeights& latent, const KeyWaits& waits);

  // A step of schedule.plan.
  absl::Status Run(const Step& step);

 private:
  const SlotSpec& SpecOf(int slot) const { return rank_.slots[static_cast<size_t>(slot)]; }
  TensorRef Field(int slot, int field) const;
  TensorRef SumsOf(int output_slot) const;
  HeadGroup GroupOf(int slot) const;
  // The rows of a kCopy or kReduce, in one of its slots.
  RowRange RowsOf(int slot, const Step& step) const;

  // Keys and values of the step's calls; expanded in ctx.scratch where they came as latents.
  absl::StatusOr<KvRows> KeysOf(const Attend& attend, const std::vector<AttendCall>& calls);
  LatentWeights WeightsOf(const HeadGroup& group) const;

  absl::Status Forward(const Attend& attend, const std::vector<AttendCall>& calls);
  absl::Status ForwardArriving(const Step& step, ArrivingCall arriving);
  absl::Status Backward(const Attend& attend, const std::vector<AttendCall>& calls);
  absl::Status LatentBackward(const Attend& attend, const std::vector<AttendCall>& calls);
  AttentionGradients GradientsOf(const Attend& attend, const AttendCall& call) const;
  absl::Status Move(const Step& step, Write write);
  absl::Status Merge(const Step& step);

  Context& ctx_;
  const AttentionGeometry::Schedule& schedule_;
  const AttentionCase& layer_;
  double scale_;
  const ExchangePlan& plan_;
  const RankPlan& rank_;
  const std::vector<SlotMemory>& slots_;
  LatentWeights latent_;
  KeyWaits waits_;
};

}  // namespace annulus
