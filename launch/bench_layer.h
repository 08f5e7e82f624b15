#pragma once

// One attention layer for benchmarks, without projections: operands that are the same whatever the ranks and
// the layout, and its passes.

#include "annulus/parallel/context_attention.h"
#include "bench.h"

namespace annulus {

// What is computed, of one sequence.
struct LayerOptions {
  std::string mask;
  int64_t document_length = 0;  // mean; 0 without documents
  ContextAttentionShape shape;
  SequenceBatch sequences;

  int64_t length() const { return sequences.lengths[0]; }
  int64_t documents() const;  // 0 without
  int64_t pairs() const { return VisiblePairs(sequences, shape.window); }
  // Of a forward pass over all ranks: four a pair of query and key and head dim, for scores and values. Those
  // of a backward pass are kBackwardFlops times as many.
  double forward_tflop() const;
  static constexpr double kBackwardFlops = 2.5;
};

// From the options of this name.
std::vector<absl::string_view> LayerOptionNames();
// What --set may give of a layer. The sequence is split over all ranks: parallel.dp, cp and tp are no choice.
std::vector<absl::string_view> LayerFields();
absl::StatusOr<LayerOptions> ReadLayer(const Arguments& arguments, const RunSpec& spec);

// Says what is about to be measured of it.
void Announce(const Bench& bench, const LayerOptions& o);

// Refuses heads that there are no kernels for, and tensors whose bytes could not be counted. `length_option`
// is what the length was given by.
absl::Status CheckLayer(const ContextAttentionShape& shape, int64_t length, absl::string_view length_option,
                        const RunSpec& spec);

// One sequence, of documents of this mean length packed one behind the other; 0 without.
SequenceBatch PackedSequence(uint64_t seed, int64_t length, int64_t document_length, Visibility visibility);

// The layer as plans are predicted for it.
AttentionCase CaseOf(const Bench& bench, const SequenceLayout& layout, const SequenceBatch& sequences,
                     const ContextAttentionShape& shape);

// Exchange options of the spec for layers of this shape.
ExchangeOptions ExchangeFor(const Bench& bench, const ContextAttentionShape& shape);

// Of a tensor [positions, ...], the rows that the layout gives to a rank; rows without a position stay as
// they are.
void CopyRowsOfRank(Context& ctx, ConstTensorRef whole, const SequenceLayout& layout, int cp_rank,
                    TensorRef rows);

// max |got - want| / max |want| over this rank's elements; infinite where something got is not finite.
absl::StatusOr<double> LargestDifference(const Bench& bench, TensorRef got, TensorRef want);

// The layer on the rows of one rank; memory of the context's `saved`.
class BenchLayer {
 public:
  BenchLayer(Bench& bench, const ContextAttentionShape& shape) : bench_(bench), shape_(shape) {}
  // Refuses what Make could not hold. Collective.
  absl::Status CheckMemory(const SequenceLayout& layout) const;
  // `layout` and `cp_rank` say which rows these are.
  absl::Status Make(const SequenceLayout& layout, int cp_rank);

  absl::Status Forward(AttentionGeometry& geometry, ExchangeStats* stats);
  absl::Status Backward(AttentionGeometry& geometry, ExchangeStats* stats);

  const ContextAttentionShape& shape() const { return shape_; }
  // Results: the output; gradients of queries and of keys and values.   [rows, 1, columns]
  TensorRef out() const { return out_; }
  TensorRef dq() const { return dq_; }
  TensorRef dkv() const { return dkv_; }

 private:
  absl::StatusOr<TensorRef> Operand(const SequenceLayout& layout, int cp_rank, int64_t columns,
                                    uint64_t seed);

  Bench& bench_;
  ContextAttentionShape shape_;
  TensorRef q_, kv_, out_, lse_, dout_, dq_, dkv_;
};

}  // namespace annulus
