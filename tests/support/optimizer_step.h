#pragma once

// A small decoder's parameters, and the steps of an optimizer over them as the trainer takes them, on any
// device.

#include <cmath>
#include <optional>

#include "annulus/comm/communicator.h"
#include "annulus/device/transfer.h"
#include "annulus/ops/elementwise.h"
#include "annulus/train/optimizer.h"

namespace annulus::testing {

// Buckets of 55, 205, 185 and 60 elements for one pair of layers: shards cut through parameters, and most
// group sizes need padding. `width` times as wide they have more elements, and shards still begin at no
// round address.
inline ModelSpec SmallDecoder(int layer_pairs = 1, int64_t width = 1) {
  ModelSpec spec{.d_model = 5 * width,
                 .vocab_size = 11,
                 .heads = 4,
                 .kv_heads = 1,
                 .head_dim = 4 * width,
                 .d_ff = 12 * width,
                 .norm_eps = 1e-5,
                 .init_stddev = 0.5,
                 .tied_head = false,
                 .layers = {}};
  for (int pair = 0; pair < layer_pairs; ++pair) {
    spec.layers.push_back({LayerKind::kAttention, 0, 100.0});
    spec.layers.push_back({LayerKind::kMlp, 0, std::nullopt});
  }
  return spec;
}

// Makes gradients as a backward pass does, from the last bucket to the first, and starts the reduction of
// each: add(bucket) adds to a bucket's.
template <typename Fn>
void ReduceBackward(ParamStore& params, ShardedAdamW& optimizer, Fn&& add) {
  for (int bucket = params.buckets() - 1; bucket >= 0; --bucket) {
    ANNULUS_CHECK_OK(optimizer.PrepareGradients(bucket));
    add(bucket);
    ANNULUS_CHECK_OK(optimizer.StartReduce(bucket));
  }
}

struct StepEnd {
  Communicator group;
  double clip_norm = 0;
  int64_t step = 1;
  double lr = 0;
};

// After StartReduce of every bucket: norm over the group, clipping, update, parameters gathered. Returns the
// norm before clipping.
inline double FinishStep(Context& ctx, ShardedAdamW& optimizer, StepEnd end) {
  const Tensor squares(ctx.device, DType::kF64, {1}), factor(ctx.device, DType::kF64, {1});
  ANNULUS_CHECK_OK(Zero(ctx, squares.ref()));
  ANNULUS_CHECK_OK(optimizer.FinishReduce(squares.ref()));
  ANNULUS_CHECK_OK(end.group.AllReduce(squares.ref(), ReduceOp::kSum));
  ANNULUS_CHECK_OK(ClipFactor(ctx, squares.ref(), end.clip_norm, factor.ref()));
  ANNULUS_CHECK_OK(optimizer.Update(end.step, end.lr, factor.ref()));
  ANNULUS_CHECK_OK(optimizer.WaitForParameters());
  double sum = 0;
  Download(ctx, squares.ref(), &sum);
  return std::sqrt(sum);
}

}  // namespace annulus::testing
