#pragma once

// What a model costs, from its spec alone: parameters, FLOPs, memory. Used by `annulus plan`, the step report
// and the scaling studies.

#include <array>
#include <cstdint>
#include <map>

#include "annulus/base/dtype.h"
#include "annulus/device/device.h"
#include "annulus/model/mixer.h"
#include "annulus/model/params.h"
#include "annulus/model/spec.h"
#include "annulus/parallel/state_passing.h"

namespace annulus {

// Training FLOPs per token: three times the forward pass; recomputation is not counted. Forward, with N
// elements of the matrices a token passes (embedding lookup left out, head included; those of tied branches
// each time):
//   2 N
//   + attention:    4 H dh S'                S': visible keys; latent: 2 g H (nope + rope + v) S'
//   + Mamba-2:      4 Di N + Q (G N + Di)    Q: chunk; lightning and BASED likewise, G N = H K
//   + DeltaNet:     6 H K V
// causal: S' is the mean of visible keys, S/2 without a window; full: S' = min(S, window).
struct FlopsPerToken {
  double causal = 0, full = 0;
};
FlopsPerToken TrainingFlops(const ModelSpec& spec, int64_t seq_len);

// Mean over positions 0..seq_len-1 of the keys a causal query with this window sees.
double MeanVisibleKeys(int64_t seq_len, int64_t window);

// What the rank that sends most sends along the sequence in one pass of a state-space layer. It does not
// depend on how long the sequence is, as long as no segment is shorter than what a convolution looks back.
struct StateExchange {
  int64_t state_bytes = 0;  // states with their transitions
  int64_t halo_bytes = 0;   // rows before a convolution, backward their gradients
};
struct StateExchangeInputs {
  SequenceLayout layout;
  int64_t sequences = 1;  // micro-batch
  int64_t tp = 1;
  DType dtype = DType::kF32;  // compute dtype
};
// kind: of those that pass states.
StateExchange StateExchangeOf(const ModelSpec& spec, BranchKind kind, StateOrder order,
                              const StateExchangeInputs& inputs);

// What a rank holds while training, in bytes.
struct MemoryPlan {
  int64_t parameters = 0;
  int64_t gradients = 0;
  int64_t optimizer =
      0;  // m, v, a master copy and reduced gradients where there are such; of dp x cp a share
  int64_t activations = 0;  // kept from forward to backward
  // Temporaries at the peak of backward, with the loss chunk of the device. The tiles and workspaces of
  // kernels are left out.
  int64_t workspace = 0;
  int64_t exchange = 0;  // buffers that the exchange keeps for itself

  struct Part {
    const char* name;
    int64_t bytes;
  };
  std::array<Part, 6> parts() const;  // all of the above
  int64_t total() const;
};

// Where the buffers of an exchange between cp ranks lie.
enum class ExchangeMemory {
  kNone,       // one cp rank
  kWorkspace,  // among the temporaries of the layer
  kOwn,        // memory of their own, which peers write into
};

// What layers of a class exchange, by the plans that were chosen for them: of the pass that needs more.
struct PlannedExchange {
  int64_t buffer_bytes = 0;       // on the rank that needs most
  bool expanded_at_home = false;  // latent attention: keys and values travel, not latents
};
using PlannedExchanges = std::map<AttentionClass, PlannedExchange>;

struct MemoryInputs {
  DeviceKind device = DeviceKind::kCpu;
  DType dtype = DType::kF32;  // compute dtype
  int64_t local_tokens = 0;   // rows * micro-batch, meta tokens among them
  int64_t sequences = 1;      // micro-batch
  int64_t segments = 1;       // runs of consecutive positions on a rank: two with zigzag
  int64_t cp = 1;
  int64_t tp = 1;
  int64_t shards = 1;  // dp x cp
  ExchangeMemory exchange = ExchangeMemory::kNone;
  PlannedExchanges planned = {};  // of classes that are not here: latents, by a KV ring
  Recompute recompute = Recompute::kAttentionOutput;
  GradientMemory gradients = GradientMemory::kAll;
};
MemoryPlan PlanMemory(const ModelSpec& spec, const MemoryInputs& inputs);

}  // namespace annulus
