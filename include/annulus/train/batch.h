#pragma once

// One rank's share of an optimizer step's sequences: which sequences belong to its data-parallel rank, and
// which of their tokens to its context-parallel rank.

#include <vector>

#include "annulus/parallel/mask.h"
#include "annulus/train/data.h"
#include "annulus/train/spec.h"

namespace annulus {

// Where positions of a run's sequences lie, meta tokens included.
SequenceLayout LayoutOf(const RunSpec& spec);

// Sequences that go through the model together, with its meta tokens before each. tokens and targets are of
// this cp rank's rows, ordered (row, sequence): the same on every rank of a tensor-parallel group.
struct MicroBatch {
  SequenceBatch sequences;
  std::vector<int32_t> tokens, targets;
  int64_t counted_tokens = 0;  // of whole sequences, on all cp ranks together
};

using Batch = std::vector<MicroBatch>;

// layout: LayoutOf the run, or of shorter sequences.
MicroBatch MakeMicroBatch(const std::vector<Sequence>& sequences, const RunSpec& spec,
                          const SequenceLayout& layout, int cp_rank);

// Sequences of optimizer step `step` for data-parallel rank `dp_rank` of `dp_size`, cut into micro-batches.
// Step s holds training sequences [s, s + 1) * sequences_per_step, whatever the number of ranks.
absl::StatusOr<Batch> LoadBatch(const DataSet& data, const RunSpec& spec, const SequenceLayout& layout,
                                int64_t step, int dp_rank, int dp_size, int cp_rank);

}  // namespace annulus
