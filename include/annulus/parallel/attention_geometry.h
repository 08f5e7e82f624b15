#pragma once

// Everything about one batch of sequences that attention layers share: layout, masks, and the exchange plans
// of layers of each shape, chosen, built and agreed on by the group at first use.

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "annulus/comm/communicator.h"
#include "annulus/comm/exchange_build.h"
#include "annulus/comm/exchange_transport.h"
#include "annulus/parallel/attend_calls.h"
#include "annulus/parallel/choose_latents.h"
#include "annulus/parallel/choose_plan.h"
#include "annulus/parallel/device_bounds.h"
#include "annulus/parallel/exchange_transports.h"
#include "annulus/parallel/machine_profile.h"
#include "annulus/parallel/mask.h"

namespace annulus {

// How attention layers exchange. The same on every rank of the group.
struct ExchangeOptions {
  // Plans to choose from by their predicted time. Empty: all that can be built where the machine is known,
  // else the KV ring; of several the first where it is not.
  std::vector<PlanChoice> forward = {}, backward = {};
  std::optional<TransportKind> transport = {};                    // nothing: chosen from `available`
  std::vector<TransportKind> available = {TransportKind::kHost};  // that the group can use, best first
  MachineProfile machine = {};                                    // unknown without rates of attention
  LinkThrottle throttle = {};
  int64_t buffer_bytes = 0;  // that chosen plans may take on a rank; 0: no limit
  LatentExchange latents = LatentExchange::kAuto;
  std::vector<int> forward_parts = {}, backward_parts = {};  // PlanOptions::parts
  double patience_seconds = 600;  // of a kernel that takes keys as they come, for those of a peer
};
PlanOptions PlanOptionsOf(const ExchangeOptions& options, Pass pass);

struct ContextAttentionShape {
  int64_t heads = 0, kv_heads = 0;
  int64_t head_dim = 0;  // of queries and keys
  int64_t v_head_dim = 0;
  int64_t window = 0;  // keys that a query sees; 0: all
  double scale = 1.0;
  // Keys and values are given as latents; kv_heads is 1.
  std::optional<LatentShape> latent = {};
};

// Of the same layer, with keys and values in place of latents.
ContextAttentionShape Expanded(ContextAttentionShape shape);

class AttentionGeometry {
 public:
  // `transports`: those of the same group at the options' throttle, to share; null: its own.
  AttentionGeometry(SequenceLayout layout, Communicator cp, ExchangeOptions options = {},
                    std::shared_ptr<ExchangeTransports> transports = nullptr);

  // Starts a new batch. Without documents plans are the same for every batch of the same size, and are kept.
  // With documents they are built anew, but what was chosen for the first batch stays chosen.
  void SetBatch(SequenceBatch sequences);

  // A result that the plan finds at home.
  struct HomeResult {
    Width width = Width::kAccumulator;
    bool empty_before = true;  // the plan adds to it, or leaves rows out: they must hold an empty result
  };
  struct Choice {
    PlanChoice plan = {};
    TransportKind transport = TransportKind::kHost;
    std::optional<PlanCandidate> predicted = {};  // where it was chosen by its time
    std::string why = {};                         // in one line; then
  };
  // One pass of a layer on this batch, with the kernel calls of its steps.
  struct Schedule {
    AttentionCase layer;  // without lengths and documents
    Choice choice = {};
    ExchangePlan plan = {};
    std::vector<std::vector<AttendCall>> calls = {};  // of this rank, by step
    // By step: those of this rank that take keys as they come; `calls` has the call alone.
    std::map<size_t, ArrivingCall> arriving = {};
    std::string kernels = {};  // of the calls: "hopper", "cuda mma, cudnn", "hopper on keys as they come"
    DeviceBounds bounds = {};  // of these calls
    std::array<HomeResult, kPayloads> results = {};  // by payload
    bool alone = false;  // every rank of the group computes in one step: nothing is sent
    bool whole = false;  // one call with all keys that this rank's queries see: nothing is carried or sent
  };
  // Decides, chooses and builds for both passes of these layers, which are of the current batch, and takes
  // the memory of their exchange, so that no step waits for that; where the batch has documents, as much as
  // without any. Balanced plans, double rings and rings in parts may need more for the documents of another
  // batch: then transports take it when they get there. Collective.
  absl::Status Prepare(Context& ctx, const std::vector<AttentionCase>& layers);

  // Built, and agreed on by the group, at first use: collective then.
  absl::StatusOr<const Schedule*> ScheduleFor(Context& ctx, const ContextAttentionShape& shape, DType dtype,
                                              Pass pass);

  // What a pass of latent attention moves between ranks. Decided by the group at first use: collective then.
  absl::StatusOr<const LatentDecision*> DecisionFor(Context& ctx, const ContextAttentionShape& shape,
                                                    DType dtype, Pass pass);

  // Of a layer that has been used on this batch; null of others.
  const Schedule* FindSchedule(const AttentionCase& layer, Pass pass) const;
  const LatentDecision* FindDecision(const AttentionCase& layer, Pass pass) const;

  // Of layers of one shape: window, heads, KV heads, dims of heads and values, columns of the latent (0:
  // none), dtype; and pass.
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, DType, Pass>;
  // Those of the batch that have been used.
  const std::map<Key, Schedule>& schedules() const { return schedules_; }

  const SequenceLayout& layout() const { return layout_; }
  const SequenceBatch& sequences() const { return sequences_; }
  const ExchangeOptions& options() const { return options_; }
  Communicator& cp() { return cp_; }
  ConstTensorRef Positions(Context& ctx);  // i64, global, of this rank's rows
  // i32 [rows, batch]: how many tokens of its document are before each; 0 starts one. Of the current batch.
  ConstTensorRef Ages(Context& ctx);
  // Made at first use: collective then.
  absl::StatusOr<ExchangeTransport*> Transport(Context& ctx, TransportKind kind) {
    return transports_->Of(ctx, kind);
  }
  // All that plans may use. Collective.
  absl::StatusOr<std::vector<ExchangeTransport*>> Transports(Context& ctx);
  int64_t exchange_bytes() const { return transports_->device_bytes(); }

 private:
  AttentionCase CaseOf(const Context& ctx, const ContextAttentionShape& shape, DType dtype) const;
  absl::StatusOr<const LatentDecision*> DecisionOf(const AttentionCase& layer, Pass pass);
  absl::StatusOr<const Schedule*> ScheduleOf(Context& ctx, AttentionCase layer, Pass pass);
  absl::StatusOr<const Choice*> ChoiceFor(const AttentionCase& layer, Pass pass);
  absl::StatusOr<Choice> Choose(const AttentionCase& layer, Pass pass);
  absl::StatusOr<ExchangePlan> BuildFor(const AttentionCase& layer, const SequenceBatch& sequences, Pass pass,
                                        const PlanChoice& choice) const;
  absl::Status Build(Pass pass, Schedule* schedule);
  absl::Status Reserve(Context& ctx, const Schedule& schedule);
  void MakeCalls(Context& ctx, Schedule* schedule);

  SequenceLayout layout_;
  Communicator cp_;
  ExchangeOptions options_;
  std::shared_ptr<ExchangeTransports> transports_;
  SequenceBatch sequences_;
  Tensor positions_;
  Tensor ages_;
  bool ages_known_ = false;  // of the current batch
  std::map<Key, Choice> choices_;
  std::map<Key, LatentDecision> decisions_;
  std::map<Key, Schedule> schedules_;
  std::vector<DeviceBounds> spare_bounds_;  // of batches before: document masks change with every batch
};

}  // namespace annulus
