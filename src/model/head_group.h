#pragma once

// Heads of tensor-parallel ranks that attend for each other (TPLA). The ranks of a head group project the
// queries of H / tp heads each; every one of them attends for all heads of the group, over its branches of
// the latent, and what it finds is a summand of the output of all of them.
//
//   Gather  | rank 0's heads |, | rank 1's heads |  ->  | rank 0's | rank 1's | on both
//   Sum     | rank 0's | rank 1's | of both, added  ->  | rank 0's heads |, | rank 1's heads |
//
// A group of one rank: nothing moves.

#include "annulus/model/mixer.h"

namespace annulus {

// Columns of this rank's heads -> those of all heads of its group of `ranks`, in ctx.scratch; x itself where
// the group is one rank.   x: [rows, batch, columns]
absl::StatusOr<TensorRef> GatherHeads(Context& ctx, ModelStep& step, int ranks, TensorRef x);

// The sum over the group of `all` [rows, batch, ranks * columns], this rank's columns of it: in ctx.scratch;
// `all` itself where the group is one rank.
absl::StatusOr<TensorRef> SumHeads(Context& ctx, ModelStep& step, int ranks, TensorRef all);

}  // namespace annulus
