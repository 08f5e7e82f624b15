#pragma once

// What the kernels of a layer do for one micro-batch on a rank, in the order in which mixers run them, before
// any of it has a time. What each mixer runs is told here once more: a test holds the products and scans to
// the FLOPs of the model.

#include <vector>

#include "annulus/model/cost.h"
#include "annulus/parallel/machine_profile.h"

namespace annulus {

enum class OpKind {
  kProduct,   // size: FLOPs
  kGradient,  // one of the two gradients of a product; size: FLOPs
  kPass,      // size: bytes read and written
  kScan,      // size: updates of states (ScanRate)
  kAttention,
  kStates,         // size: bytes that the rank which sends most sends, as of the next two
  kTensorGather,   // of tokens
  kTensorScatter,  // of sums
};

// Which recompute policies do it again in backward.
enum class Again { kNever, kUnlessNone, kUnlessElementwise, kWithBlock };

struct Op {
  OpKind kind = OpKind::kPass;
  double size = 0;
  double times = 1;  // calls of this size
  PassKind pass_kind = PassKind::kMove;
  ScanKernel scan = ScanKernel::kSsd;
  Pass pass = Pass::kForward;
  AttentionClass attention = {};
  Again again = Again::kNever;
  bool overlaps_next = false;  // Stage::overlaps_next
};

// In the order of the compute stream; backward with what is computed again.
struct LayerOps {
  std::vector<Op> forward, backward;
};

struct OpInputs {
  const ModelSpec& model;
  MemoryInputs run;       // `planned` is not read
  SequenceLayout layout;  // of the cp group
};

LayerOps EmbeddingOps(const OpInputs& inputs);
LayerOps OpsOf(const OpInputs& inputs, size_t layer);
LayerOps HeadOps(const OpInputs& inputs);

}  // namespace annulus
