#include "bench_layer.h"

#include <algorithm>
#include <cmath>

#include "annulus/base/random.h"
#include "annulus/device/transfer.h"
#include "annulus/train/exchange.h"

namespace annulus {

absl::StatusOr<ContextAttentionShape> ShapeOf(const Bench& bench) {
  ContextAttentionShape shape;
  ANNULUS_ASSIGN_OR_RETURN(shape.heads, bench.Int("--heads", 16));
  ANNULUS_ASSIGN_OR_RETURN(shape.kv_heads, bench.Int("--kv_heads", shape.heads));
  ANNULUS_ASSIGN_OR_RETURN(shape.head_dim, bench.Int("--dim", 128));
  ANNULUS_ASSIGN_OR_RETURN(shape.v_head_dim, bench.Int("--v_dim", shape.head_dim));
  if (bench.arguments.Has("--window")) {
    ANNULUS_ASSIGN_OR_RETURN(shape.window, bench.Int("--window", 1));
  }
  if (shape.heads % shape.kv_heads != 0) {
    return Invalid("--kv_heads=", shape.kv_heads, ": expected a divisor of --heads=", shape.heads);
  }
  shape.scale = 1 / std::sqrt(static_cast<double>(shape.head_dim));
  return shape;
}

absl::StatusOr<SequenceBatch> SequencesOf(const Bench& bench) {
  ANNULUS_ASSIGN_OR_RETURN(const int64_t length, bench.Int("--length", 32768));
  SequenceBatch sequences{.batch = 1, .lengths = {length}, .document_starts = {}};
  const std::string mask = bench.arguments.Last("--mask", "causal");
  if (mask == "full") sequences.visibility = Visibility::kFull;
  if (mask == "documents") {
    // Lengths between a part of the sequence and a thirtieth of that, evenly on a logarithmic scale.
    const RandomStream random(1, "bench documents");
    std::vector<int64_t> starts;
    for (uint64_t i = 0; static_cast<int64_t>(starts.size()) < length; ++i) {
      const double size = static_cast<double>(length) / 3 * std::pow(30.0, -random.Uniform(i));
      const auto start = static_cast<int64_t>(starts.size());
      starts.resize(static_cast<size_t>(std::min(length, start + std::max<int64_t>(1, std::llround(size)))),
                    start);
    }
    sequences.document_starts = {std::move(starts)};
  }
  if (mask != "causal" && mask != "full" && mask != "documents") {
    return Invalid("--mask=", mask, ": expected one of causal, full, documents");
  }
  return sequences;
}

ExchangeOptions ExchangeFor(const Bench& bench, const ContextAttentionShape& shape) {
  RunSpec spec = bench.spec;
  spec.model.heads = shape.heads;
  return ExchangeOptionsOf(spec, bench.machine.exchange.available, bench.machine.exchange.machine);
}

void CopyRowsOfRank(Context& ctx, ConstTensorRef whole, const SequenceLayout& layout, int cp_rank,
                    TensorRef rows) {
  for (const LayoutChunk& chunk : layout.chunks(cp_rank)) {
    for (int64_t i = 0; i < chunk.rows;) {
      const int64_t position = chunk.position + chunk.stride * i;
      if (position >= whole.dim(0)) break;
      const int64_t run = chunk.stride == 1 ? std::min(chunk.rows, whole.dim(0) - position) : 1;
      CopyBytes(whole.Rows(position, position + run), rows.Rows(chunk.row + i, chunk.row + i + run),
                ctx.stream());
      i += run;
    }
  }
}

// The rows are those of a tensor of the whole sequence that every rank draws.
absl::StatusOr<TensorRef> BenchLayer::Operand(const SequenceLayout& layout, int cp_rank, int64_t columns,
                                              uint64_t seed) {
  Context& ctx = bench_.ctx();
  const TensorRef rows = ctx.saved.Allocate(bench_.dtype(), {layout.local_rows(), 1, columns});
  ArenaScope scope(ctx.saved);
  ANNULUS_ASSIGN_OR_RETURN(const TensorRef whole, bench_.Random({layout.padded_length(), 1, columns}, seed));
  CopyRowsOfRank(ctx, whole, layout, cp_rank, rows);
  return rows;
}

absl::Status BenchLayer::Make(const SequenceLayout& layout, int cp_rank) {
  const int64_t q = shape_.heads * shape_.head_dim, v = shape_.heads * shape_.v_head_dim;
  const int64_t kv = shape_.kv_heads * (shape_.head_dim + shape_.v_head_dim);
  ANNULUS_ASSIGN_OR_RETURN(q_, Operand(layout, cp_rank, q, 1));
  ANNULUS_ASSIGN_OR_RETURN(kv_, Operand(layout, cp_rank, kv, 2));
  ANNULUS_ASSIGN_OR_RETURN(dout_, Operand(layout, cp_rank, v, 3));
  Arena& arena = bench_.ctx().saved;
  out_ = arena.Allocate(bench_.dtype(), dout_.shape());
  lse_ = arena.Allocate(AccumOf(bench_.dtype()), {layout.local_rows(), 1, shape_.heads});
  dq_ = arena.Allocate(bench_.dtype(), q_.shape());
  dkv_ = arena.Allocate(bench_.dtype(), kv_.shape());
  return absl::OkStatus();
}

absl::Status BenchLayer::Forward(AttentionGeometry& geometry, ExchangeStats* stats) {
  return ContextAttentionForward(bench_.ctx(), geometry, shape_,
                                 {.q = q_, .kv = kv_, .out = out_, .lse = lse_}, stats);
}

absl::Status BenchLayer::Backward(AttentionGeometry& geometry, ExchangeStats* stats) {
  return ContextAttentionBackward(
      bench_.ctx(), geometry, shape_,
      {.q = q_, .kv = kv_, .out = out_, .lse = lse_, .dout = dout_, .dq = dq_, .dkv = dkv_}, stats);
}

}  // namespace annulus
