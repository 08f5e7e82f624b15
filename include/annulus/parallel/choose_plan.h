#pragma once

// Predicted time of exchange plans for an attention layer, and the choice of the fastest: a plan's steps take
// what the machine profile says of their kernel calls and messages, and a discrete-event simulation says when
// they end.

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "annulus/comm/exchange_build.h"
#include "annulus/comm/exchange_simulate.h"
#include "annulus/parallel/latent_expansion.h"
#include "annulus/parallel/machine_profile.h"
#include "annulus/parallel/mask.h"
#include "annulus/parallel/sequence_layout.h"

namespace annulus {

// One attention layer on one batch.
struct AttentionCase {
  SequenceLayout layout;
  SequenceBatch sequences;
  int64_t heads = 0, kv_heads = 0, head_dim = 0, v_head_dim = 0;
  int64_t window = 0;
  DeviceKind device = DeviceKind::kCpu;
  DType dtype = DType::kF32;
  Determinism determinism = Determinism::kOff;
  bool hopper = false;  // RunsHopperKernels of the device
  AttentionChoice kernel = AttentionChoice::kFastest;
  // KV slots hold latents, as one KV head, and head_dim and v_head_dim are those of the expanded heads.
  std::optional<LatentShape> latent = {};
};

// Of a block of the layer with that mask.
AttentionKernelCase KernelCaseOf(const AttentionCase& layer, Pass pass, MaskShape mask_shape);

// What may be chosen from.
struct PlanOptions {
  std::vector<PlanChoice> plans;          // empty: AllChoices
  std::vector<TransportKind> transports;  // that the group can use; at least one
  LinkThrottle throttle;
  int64_t buffer_bytes = 0;  // slots that are not home may take this much on a rank; 0: no limit
  // Rising numbers of parts that the fastest choices of a few kinds are tried with besides their own, where
  // waiting less for blocks could make them the fastest of all.
  std::vector<int> parts = {};
};

// With more ranks than this a plan has so many steps that only what can be near the fastest is simulated.
inline constexpr int kSimulateAllRanks = 32;

struct PlanCandidate {
  PlanChoice choice;
  std::string name;  // NameOf(choice)
  TransportKind transport = TransportKind::kHost;
  absl::Status refused;        // why it cannot be, else OK and the rest is set
  bool simulated = true;       // else `seconds` is what it takes at least, and exposed_seconds is not known
  double seconds = 0;          // predicted, of the slowest rank
  double exposed_seconds = 0;  // of the same rank
  int64_t bytes_sent = 0;      // of the rank that sends most
  int64_t buffer_bytes = 0;    // of the rank that needs most
};

// What each payload's slots hold, as the layer binds them (context_attention.h). `group`: the slot's, or all
// heads where it has those.
std::vector<SlotField> FieldsOf(const AttentionCase& layer, Pass pass, const HeadGroup& group,
                                const SlotSpec& slot);

// The group of all heads.
HeadGroup AllHeadsOf(const AttentionCase& layer);

// Cost of a plan built for the layer, on a machine that has rates of the transport.
ExchangeCost CostOf(const AttentionCase& layer, const ExchangePlan& plan, const MachineProfile& machine,
                    TransportKind transport, LinkThrottle throttle);

// What a rank of a plan sends to each other in all, in bytes.
std::map<int, int64_t> BytesSentBy(int rank, const AttentionCase& layer, const ExchangePlan& plan);

// Sets what is predicted.
void SetPredicted(const Simulation& simulation, PlanCandidate* candidate);

// Every candidate of one pass: those that can be, fastest first (what is as fast to 1 in 10^4 by memory),
// then those that were not simulated, then the refused. Before them all the choice: of those within 2% of the
// fastest the one that waits least for messages, then sends least, then leaves computing its multiprocessors.
// The same on every rank.
std::vector<PlanCandidate> RankPlans(const AttentionCase& layer, Pass pass, const PlanOptions& options,
                                     const MachineProfile& machine);

// "why": one line that names the winner's and the best other kind's times and what made the difference.
std::string WhyItWon(const std::vector<PlanCandidate>& ranked);

}  // namespace annulus
