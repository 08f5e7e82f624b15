// Attention of one layer over all ranks, without projections: the exchange of KV blocks and the block
// kernels.

#include "bench_layer.h"

namespace annulus {

namespace {

// Of the sequence as a whole.
MaskShape MaskShapeOf(const ContextAttentionShape& shape, const SequenceBatch& sequences) {
  if (shape.window > 0 || !sequences.document_starts.empty()) return MaskShape::kGeneral;
  return sequences.visibility == Visibility::kFull ? MaskShape::kFull : MaskShape::kCausal;
}

// "kv_ring toward lower ranks by host"
std::string PlanOf(const AttentionGeometry& geometry, Pass pass) {
  for (const auto& [key, schedule] : geometry.schedules()) {
    if (schedule.plan.pass == pass) {
      return absl::StrCat(schedule.plan.name, " by ", Name(schedule.choice.transport));
    }
  }
  return "";
}

}  // namespace

absl::Status BenchAttention(Bench& bench) {
  ANNULUS_ASSIGN_OR_RETURN(const ContextAttentionShape shape, Agreed(bench, ShapeOf(bench)));
  ANNULUS_ASSIGN_OR_RETURN(const SequenceBatch sequences, Agreed(bench, SequencesOf(bench)));
  const int64_t length = sequences.lengths[0];
  const SequenceLayout layout(bench.spec.parallel.layout, length, bench.machine.mesh.shape.cp);
  AttentionGeometry geometry(layout, bench.machine.mesh.cp, ExchangeFor(bench, shape));
  geometry.SetBatch(sequences);
  BenchLayer layer(bench, shape);
  ANNULUS_RETURN_IF_ERROR(layer.Make(layout, bench.machine.mesh.at.cp));

  ExchangeStats stats;
  ANNULUS_ASSIGN_OR_RETURN(const double forward,
                           bench.Seconds([&] { return layer.Forward(geometry, &stats); }));
  ANNULUS_ASSIGN_OR_RETURN(const double backward,
                           bench.Seconds([&] { return layer.Backward(geometry, &stats); }));
  (void)bench.ctx().waits.TakeSeconds(WaitKind::kExchange);
  ANNULUS_ASSIGN_OR_RETURN(const double both, bench.Seconds([&]() -> absl::Status {
    ANNULUS_RETURN_IF_ERROR(layer.Forward(geometry, &stats));
    return layer.Backward(geometry, &stats);
  }));
  // Four FLOPs a (query, key) pair and head dim forward, for scores and values; backward 2.5 times as many.
  const double pairs = static_cast<double>(VisiblePairs(sequences, shape.window));
  const double flops = 2e-12 * pairs *
                       static_cast<double>(shape.heads * (shape.head_dim + shape.v_head_dim)) /
                       bench.machine.mesh.world.size();
  const int64_t size = CeilingSize(bench);
  ANNULUS_ASSIGN_OR_RETURN(const double gemm, GemmRate(bench, size, size, size));
  const AttentionKernel kernel = ChooseAttentionKernel({.device = bench.ctx().device.kind,
                                                        .dtype = bench.dtype(),
                                                        .dim = shape.head_dim,
                                                        .v_dim = shape.v_head_dim,
                                                        .mask_shape = MaskShapeOf(shape, sequences),
                                                        .determinism = bench.ctx().determinism});
  bench.Report({{"length", length},
                {"heads", shape.heads},
                {"kv_heads", shape.kv_heads},
                {"dim", shape.head_dim},
                {"v_dim", shape.v_head_dim},
                {"window", shape.window},
                {"kernel", std::string(Name(kernel))},
                {"mask", bench.arguments.Last("--mask", "causal")},
                {"forward_plan", PlanOf(geometry, Pass::kForward)},
                {"backward_plan", PlanOf(geometry, Pass::kBackward)},
                {"forward_ms", forward * 1e3},
                {"backward_ms", backward * 1e3},
                {"both_ms", both * 1e3},
                {"forward_tflops", flops / forward},
                {"backward_tflops", 2.5 * flops / backward},
                {"both_tflops", 3.5 * flops / both},
                {"gemm_tflops", gemm}});
  return absl::OkStatus();
}

}  // namespace annulus
