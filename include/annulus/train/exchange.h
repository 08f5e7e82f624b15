#pragma once

// From parallel.exchange of a run to what attention layers choose their plans from.

#include <optional>
#include <string>
#include <vector>

#include "annulus/comm/communicator.h"
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

// The softmax attention of every layer with this window, on sequences of one micro-batch with their meta
// tokens; a tensor-parallel rank's heads.
AttentionCase AttentionCaseOf(const RunSpec& spec, int64_t window, SequenceBatch sequences);

// Softmax attention layers of one window.
struct AttentionKind {
  int64_t window = 0;  // 0 = all keys
  std::vector<size_t> layers;
};
std::string LayersText(const AttentionKind& kind);                    // "2 attention layers (all keys)"
std::vector<AttentionKind> AttentionKindsOf(const ModelSpec& model);  // by ascending window
std::string WindowText(int64_t window);                               // "all keys", "window 128"
const char* Name(Pass pass);                                          // "forward"

}  // namespace annulus
