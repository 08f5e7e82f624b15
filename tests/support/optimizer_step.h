#pragma once

// The end of an optimizer step, as the trainer takes it.

#include <cmath>

#include "annulus/comm/communicator.h"
#include "annulus/ops/elementwise.h"
#include "annulus/train/optimizer.h"

namespace annulus::testing {

struct StepEnd {
  OptimizerGroups groups;
  double clip_norm = 0;
  int64_t step = 1;
  double lr = 0;
};

// After StartReduce of every bucket: norm over both groups, clipping, update, parameters gathered. Returns
// the norm before clipping.
inline double FinishStep(Context& ctx, ShardedAdamW& optimizer, StepEnd end) {
  const Tensor squares(Device{}, DType::kF64, {1}), factor(Device{}, DType::kF64, {1});
  ANNULUS_CHECK_OK(optimizer.FinishReduce(squares.ref()));
  ANNULUS_CHECK_OK(end.groups.shards.AllReduce(squares.ref(), ReduceOp::kSum));
  ANNULUS_CHECK_OK(end.groups.tensor.AllReduce(squares.ref()));
  ANNULUS_CHECK_OK(ClipFactor(ctx, squares.ref(), end.clip_norm, factor.ref()));
  ANNULUS_CHECK_OK(optimizer.Update(end.step, end.lr, factor.ref()));
  ANNULUS_CHECK_OK(optimizer.WaitForParameters());
  return std::sqrt(*squares.ref().data<double>());
}

}  // namespace annulus::testing
