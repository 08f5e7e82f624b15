// Attention of one layer over all ranks, without projections: the exchange of KV blocks and the block
// kernels.

#include <cmath>

#include "annulus/model/cost.h"
#include "annulus/ops/elementwise.h"
#include "annulus/parallel/context_attention.h"
#include "bench.h"

namespace annulus {
namespace {

struct Layer {
  ContextAttentionShape shape;
  TensorRef q, kv, out, lse, dout, dq, dkv;
};

absl::StatusOr<Layer> MakeLayer(Bench& bench, const ContextAttentionShape& shape, int64_t rows) {
  Layer layer{.shape = shape, .q = {}, .kv = {}, .out = {}, .lse = {}, .dout = {}, .dq = {}, .dkv = {}};
  const uint64_t seed = 4 * static_cast<uint64_t>(bench.machine.mesh.world.rank());
  const int64_t q = shape.heads * shape.head_dim, v = shape.heads * shape.v_head_dim;
  const int64_t kv = shape.kv_heads * (shape.head_dim + shape.v_head_dim);
  ANNULUS_ASSIGN_OR_RETURN(layer.q, RandomTensor(bench, {rows, 1, q}, seed + 1));
  ANNULUS_ASSIGN_OR_RETURN(layer.kv, RandomTensor(bench, {rows, 1, kv}, seed + 2));
  ANNULUS_ASSIGN_OR_RETURN(layer.dout, RandomTensor(bench, {rows, 1, v}, seed + 3));
  Arena& arena = bench.ctx().saved;
  layer.out = arena.Allocate(bench.dtype(), {rows, 1, v});
  layer.lse = arena.Allocate(AccumOf(bench.dtype()), {rows, 1, shape.heads});
  layer.dq = arena.Allocate(bench.dtype(), layer.q.shape());
  layer.dkv = arena.Allocate(bench.dtype(), layer.kv.shape());
  return layer;
}

absl::Status Forward(Bench& bench, AttentionGeometry& geometry, const Layer& layer, ExchangeStats* stats) {
  return ContextAttentionForward(bench.ctx(), geometry, layer.shape,
                                 {.q = layer.q, .kv = layer.kv, .out = layer.out, .lse = layer.lse}, stats);
}

absl::Status Backward(Bench& bench, AttentionGeometry& geometry, const Layer& layer, ExchangeStats* stats) {
  return ContextAttentionBackward(bench.ctx(), geometry, layer.shape,
                                  {.q = layer.q,
                                   .kv = layer.kv,
                                   .out = layer.out,
                                   .lse = layer.lse,
                                   .dout = layer.dout,
                                   .dq = layer.dq,
                                   .dkv = layer.dkv},
                                  stats);
}

absl::StatusOr<ContextAttentionShape> ShapeOf(const Bench& bench) {
  ContextAttentionShape shape;
  ANNULUS_ASSIGN_OR_RETURN(shape.heads, bench.Int("--heads", 16));
  ANNULUS_ASSIGN_OR_RETURN(shape.kv_heads, bench.Int("--kv_heads", shape.heads));
  ANNULUS_ASSIGN_OR_RETURN(shape.head_dim, bench.Int("--dim", 128));
  ANNULUS_ASSIGN_OR_RETURN(shape.v_head_dim, bench.Int("--v_dim", shape.head_dim));
  if (bench.arguments.Has("--window")) {
    ANNULUS_ASSIGN_OR_RETURN(shape.window, bench.Int("--window", 1));
  }
  shape.scale = 1 / std::sqrt(static_cast<double>(shape.head_dim));
  return shape;
}

}  // namespace

absl::Status BenchAttention(Bench& bench) {
  ANNULUS_ASSIGN_OR_RETURN(const ContextAttentionShape shape, ShapeOf(bench));
  ANNULUS_ASSIGN_OR_RETURN(const int64_t length, bench.Int("--length", 32768));
  const SequenceLayout layout(bench.spec.parallel.layout, length, bench.machine.mesh.shape.cp);
  AttentionGeometry geometry(layout, bench.machine.mesh.cp, bench.machine.transport);
  geometry.SetBatch({.batch = 1, .lengths = {length}, .document_starts = {}});
  ANNULUS_ASSIGN_OR_RETURN(const Layer layer, MakeLayer(bench, shape, layout.local_rows()));

  ExchangeStats stats;
  ANNULUS_ASSIGN_OR_RETURN(const double forward,
                           bench.Seconds([&] { return Forward(bench, geometry, layer, &stats); }));
  ANNULUS_ASSIGN_OR_RETURN(const double backward,
                           bench.Seconds([&] { return Backward(bench, geometry, layer, &stats); }));
  (void)bench.ctx().waits.TakeSeconds(WaitKind::kExchange);
  ANNULUS_ASSIGN_OR_RETURN(const double both, bench.Seconds([&]() -> absl::Status {
    ANNULUS_RETURN_IF_ERROR(Forward(bench, geometry, layer, &stats));
    return Backward(bench, geometry, layer, &stats);
  }));
  // Four FLOPs a (query, key) pair and head dim forward, for scores and values; backward 2.5 times as many.
  const double pairs = MeanVisibleKeys(length, shape.window) * static_cast<double>(length);
  const double flops = 2e-12 * pairs *
                       static_cast<double>(shape.heads * (shape.head_dim + shape.v_head_dim)) /
                       bench.machine.mesh.world.size();
  const int64_t size = CeilingSize(bench);
  ANNULUS_ASSIGN_OR_RETURN(const double gemm, GemmRate(bench, size, size, size));
  const AttentionKernel kernel =
      ChooseAttentionKernel({.device = bench.ctx().device.kind,
                             .dtype = bench.dtype(),
                             .dim = shape.head_dim,
                             .v_dim = shape.v_head_dim,
                             .mask_shape = shape.window > 0 ? MaskShape::kGeneral : MaskShape::kCausal,
                             .determinism = bench.ctx().determinism});
  bench.Report({{"length", length},
                {"heads", shape.heads},
                {"kv_heads", shape.kv_heads},
                {"dim", shape.head_dim},
                {"v_dim", shape.v_head_dim},
                {"window", shape.window},
                {"kernel", std::string(Name(kernel))},
                {"transport", std::string(Name(bench.machine.transport))},
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
