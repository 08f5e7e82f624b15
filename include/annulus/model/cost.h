#pragma once

// What a model costs, from its spec alone: parameters, FLOPs, memory. Used by `annulus plan`, the step report
// and the scaling studies.

#include <cstdint>

#include "annulus/base/dtype.h"
#include "annulus/device/device.h"
#include "annulus/model/params.h"
#include "annulus/model/spec.h"

namespace annulus {

// Training FLOPs per token (forward and backward, recomputation not counted), N matmul parameters (embedding
// lookup left out, head included), H query heads of head_dim:
//   causal: 6 N + sum over attention layers of 12 H head_dim mean-visible-keys   (S/2 without a window)
//   full:   6 N + sum over attention layers of 12 H head_dim min(S, window)
struct FlopsPerToken {
  double causal = 0, full = 0;
};
FlopsPerToken TrainingFlops(const ModelSpec& spec, int64_t seq_len);

// Mean over positions 0..seq_len-1 of the keys a causal query with this window sees.
double MeanVisibleKeys(int64_t seq_len, int64_t window);

// What a rank holds while training, in bytes.
struct MemoryPlan {
  int64_t parameters = 0;
  int64_t gradients = 0;
  int64_t optimizer =
      0;  // m, v, the reduced gradient and a master copy if there is one, sharded over dp x cp
  int64_t activations = 0;  // kept from forward to backward
  // Temporaries at the peak of backward, with as many exchange buffers as a plan ever has and the loss chunk
  // of the device. The tiles and workspaces of kernels are left out.
  int64_t workspace = 0;
  int64_t total() const { return parameters + gradients + optimizer + activations + workspace; }
};

struct MemoryInputs {
  DeviceKind device = DeviceKind::kCpu;
  DType dtype = DType::kF32;  // compute dtype
  int64_t local_tokens = 0;   // rows * micro-batch
  int64_t shards = 1;         // dp x cp
  bool cp_exchange = false;   // more than one cp rank
  Recompute recompute = Recompute::kAttentionOutput;
  GradientMemory gradients = GradientMemory::kAll;
};
MemoryPlan PlanMemory(const ModelSpec& spec, const MemoryInputs& inputs);

}  // namespace annulus
