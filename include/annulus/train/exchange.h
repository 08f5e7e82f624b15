#pragma once

// From parallel.exchange of a run to what attention layers choose their plans from.

#include <optional>
#include <string>
#include <vector>

#include "annulus/comm/communicator.h"
#include "annulus/model/cost.h"
#include "annulus/model/mixer.h"
#include "annulus/parallel/attention_geometry.h"
#include "annulus/train/spec.h"

namespace annulus {

// Every plan that the fields leave to choose from, each once. At least one where head_split and inner fit the
// ranks.
std::vector<PlanChoice> ChoicesOf(const PassPlanSpec& spec, int ranks, int64_t heads);

// The one that is asked for; nothing for the best.
std::optional<TransportKind> TransportOf(TransportChoice choice);

// The profile that the run names, else an assumed one of its device, which is resolved. `root` reads the file
// for all ranks of the group; collective.
absl::StatusOr<MachineProfile> ProfileOf(const RunSpec& spec);
absl::StatusOr<MachineProfile> ProfileOf(Communicator world, const RunSpec& spec);

// "assumed: NVIDIA H200, NVLink (...)": what plans are predicted by, and whether links are as they are.
std::string ProfileSource(const ExchangeSpec& exchange, const MachineProfile& machine);

// `available`: transports that the context-parallel group can use, best first.
ExchangeOptions ExchangeOptionsOf(const RunSpec& spec, std::vector<TransportKind> available,
                                  MachineProfile machine);

// One layer of the class, of latent attention one branch of it, on sequences of one micro-batch with their
// meta tokens; a tensor-parallel rank's heads. `hopper`: RunsHopperKernels of its device.
AttentionCase AttentionCaseOf(const RunSpec& spec, const AttentionClass& layers, SequenceBatch sequences,
                              bool hopper);
// Branches of the latent that a tensor-parallel rank has of a layer; 1 of softmax attention.
int64_t BranchesHere(const RunSpec& spec, const AttentionClass& layers);

// Layers of one class, by their index.
struct AttentionKind {
  AttentionClass attention;
  std::vector<size_t> layers;
};
std::string LayersText(const AttentionKind& kind);                    // "2 attention layers (all keys)"
std::vector<AttentionKind> AttentionKindsOf(const ModelSpec& model);  // in order of their classes
// "attention (all keys)", "latent attention (2 branches, window 128)"
std::string ClassText(const AttentionClass& layers);

// State-space layers of one kind, and what the rank that sends most sends in a layer.
struct StateKind {
  BranchKind branch = BranchKind::kMamba;
  std::vector<size_t> layers = {};
  StateExchange forward = {}, backward = {};
};
std::vector<StateKind> StateKindsOf(const RunSpec& spec);
// "3 mamba layers: of states 1.0 MiB forward, 1.0 MiB backward; ... whatever the length"
std::string StateText(const StateKind& kind);

const char* Name(Pass pass);  // "forward"

}  // namespace annulus
