// Attention of one layer over all ranks, without projections: the exchange of KV blocks and the block
// kernels.

#include <cmath>

#include "annulus/base/random.h"
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

// What is computed, of one sequence.
struct AttentionOptions {
  std::string mask;
  int64_t document_length = 0;  // mean; 0 without documents
  ContextAttentionShape shape;
  SequenceBatch sequences;

  int64_t length() const { return sequences.lengths[0]; }
};

// Documents packed one behind the other, of independent lengths of mean `mean`: after each token the document
// ends with probability 1 / mean, so that most are short and a few are long. The last one is cut.
std::vector<int64_t> PackedDocuments(uint64_t seed, int64_t length, int64_t mean) {
  const RandomStream random(seed, "bench documents");
  const double log_of_going_on = std::log1p(-1 / static_cast<double>(mean));
  std::vector<int64_t> starts;
  for (int64_t start = 0; start < length;) {
    const double drawn = std::log1p(-random.Uniform(static_cast<uint64_t>(start))) / log_of_going_on;
    const int64_t end = start + 1 + static_cast<int64_t>(std::min(drawn, static_cast<double>(length)));
    starts.resize(static_cast<size_t>(std::min(end, length)), start);
    start = end;
  }
  return starts;
}

absl::StatusOr<ContextAttentionShape> ShapeOf(const Arguments& arguments, const RunSpec& spec) {
  ContextAttentionShape shape;
  ANNULUS_ASSIGN_OR_RETURN(shape.heads, arguments.PositiveInt("--heads", 16));
  ANNULUS_ASSIGN_OR_RETURN(shape.kv_heads, arguments.PositiveInt("--kv_heads", shape.heads));
  ANNULUS_ASSIGN_OR_RETURN(shape.head_dim, arguments.PositiveInt("--dim", 128));
  ANNULUS_ASSIGN_OR_RETURN(shape.v_head_dim, arguments.PositiveInt("--v_dim", shape.head_dim));
  shape.scale = 1 / std::sqrt(static_cast<double>(shape.head_dim));
  if (shape.heads % shape.kv_heads != 0) {
    return Invalid("--kv_heads=", shape.kv_heads, ": expected a divisor of --heads=", shape.heads);
  }
  const DeviceKind device = DeviceKindOf(spec.device);
  if (!AttentionSupports(device, DTypeOf(spec.compute), shape.head_dim, shape.v_head_dim)) {
    const bool bf16 = spec.compute == ComputeType::kBF16;
    return Invalid("--dim=", shape.head_dim, " --v_dim=", shape.v_head_dim, ": expected ",
                   bf16 ? "64/64, 128/128 or 192/128 with compute=BF16 (--set compute=F32 takes more)"
                        : "at most 256 on GPUs");
  }
  return shape;
}

// --window and --document_length belong to the mask of their name.
absl::Status ReadMask(const Arguments& arguments, AttentionOptions* o) {
  o->mask = arguments.Last("--mask", "causal");
  const bool known =
      o->mask == "causal" || o->mask == "full" || o->mask == "window" || o->mask == "documents";
  if (!known) return Invalid("--mask=", o->mask, ": expected one of causal, full, window, documents");
  for (const auto& [option, mask, value] :
       {std::tuple{"--window", "window", &o->shape.window},
        std::tuple{"--document_length", "documents", &o->document_length}}) {
    if (o->mask == mask && !arguments.Has(option))
      return Invalid("--mask=", mask, ": expected ", option, " N");
    if (o->mask != mask && arguments.Has(option)) {
      return Invalid(option, "=", arguments.Last(option, ""), ": means nothing with --mask=", o->mask,
                     ": expected --mask ", mask);
    }
    ANNULUS_ASSIGN_OR_RETURN(*value, arguments.PositiveInt(option, 0));
  }
  if (o->mask == "full") o->sequences.visibility = Visibility::kFull;
  return absl::OkStatus();
}

// What the blocks on the diagonal of the mask look like.
MaskShape ShapeOfMask(const AttentionOptions& o) {
  return o.mask == "full" ? MaskShape::kFull : o.mask == "causal" ? MaskShape::kCausal : MaskShape::kGeneral;
}

int64_t CountDocuments(const SequenceBatch& sequences) {
  int64_t documents = 0;
  for (size_t i = 0; i < sequences.document_starts[0].size(); ++i) {
    documents += sequences.document_starts[0][i] == static_cast<int64_t>(i);
  }
  return documents;
}

// Medians of forward, of backward, and of one after the other.
struct Times {
  double forward = 0, backward = 0, both = 0;
};

absl::StatusOr<Times> Measure(Bench& bench, AttentionGeometry& geometry, const Layer& layer) {
  Times seconds;
  ExchangeStats stats;
  ANNULUS_ASSIGN_OR_RETURN(seconds.forward,
                           bench.Seconds([&] { return Forward(bench, geometry, layer, &stats); }));
  ANNULUS_ASSIGN_OR_RETURN(seconds.backward,
                           bench.Seconds([&] { return Backward(bench, geometry, layer, &stats); }));
  ANNULUS_ASSIGN_OR_RETURN(seconds.both, bench.Seconds([&]() -> absl::Status {
    ANNULUS_RETURN_IF_ERROR(Forward(bench, geometry, layer, &stats));
    return Backward(bench, geometry, layer, &stats);
  }));
  return seconds;
}

void Report(const Bench& bench, const AttentionOptions& o, const Times& seconds, double gemm) {
  const ContextAttentionShape& shape = o.shape;
  const int64_t pairs = VisiblePairs(o.sequences, shape.window);
  // Four FLOPs a (query, key) pair and head dim forward, for scores and values; backward 2.5 times as many.
  const double flops = 2e-12 * static_cast<double>(pairs) *
                       static_cast<double>(shape.heads * (shape.head_dim + shape.v_head_dim)) /
                       bench.machine.mesh.shape.cp;
  const AttentionKernel kernel = ChooseAttentionKernel({.device = bench.ctx().device.kind,
                                                        .dtype = bench.dtype(),
                                                        .dim = shape.head_dim,
                                                        .v_dim = shape.v_head_dim,
                                                        .mask_shape = ShapeOfMask(o),
                                                        .determinism = bench.ctx().determinism});
  nlohmann::ordered_json result = {{"length", o.length()},       {"heads", shape.heads},
                                   {"kv_heads", shape.kv_heads}, {"dim", shape.head_dim},
                                   {"v_dim", shape.v_head_dim},  {"mask", o.mask}};
  if (shape.window > 0) result["window"] = shape.window;
  if (o.document_length > 0) {
    result["document_length"] = o.document_length;
    result["documents"] = CountDocuments(o.sequences);
  }
  result.update({{"pairs", pairs},
                 {"kernel", std::string(Name(kernel))},
                 {"transport", std::string(Name(bench.machine.transport))},
                 {"forward_ms", seconds.forward * 1e3},
                 {"backward_ms", seconds.backward * 1e3},
                 {"both_ms", seconds.both * 1e3},
                 {"forward_tflops", flops / seconds.forward},
                 {"backward_tflops", 2.5 * flops / seconds.backward},
                 {"both_tflops", 3.5 * flops / seconds.both},
                 {"gemm_tflops", gemm}});
  bench.Report(result);
}

absl::Status Run(Bench& bench, const AttentionOptions& o) {
  const SequenceLayout layout(bench.spec.parallel.layout, o.length(), bench.machine.mesh.shape.cp);
  AttentionGeometry geometry(layout, bench.machine.mesh.cp, bench.machine.transport);
  geometry.SetBatch(o.sequences);
  ANNULUS_ASSIGN_OR_RETURN(const Layer layer, MakeLayer(bench, o.shape, layout.local_rows()));
  ANNULUS_ASSIGN_OR_RETURN(const Times seconds, Measure(bench, geometry, layer));
  const int64_t size = CeilingSize(bench.ctx().device.kind);
  ANNULUS_ASSIGN_OR_RETURN(const double gemm, GemmRate(bench, size, size, size));
  Report(bench, o, seconds, gemm);
  return absl::OkStatus();
}

absl::StatusOr<BenchRun> Plan(const Arguments& arguments, const RunSpec& spec) {
  AttentionOptions o;
  ANNULUS_ASSIGN_OR_RETURN(o.shape, ShapeOf(arguments, spec));
  ANNULUS_ASSIGN_OR_RETURN(const int64_t length, arguments.PositiveInt("--length", 32768));
  ANNULUS_RETURN_IF_ERROR(ReadMask(arguments, &o));
  ANNULUS_RETURN_IF_ERROR(
      CheckBenchTensor("--length, --heads, --dim", {length, o.shape.heads, o.shape.head_dim}));
  ANNULUS_RETURN_IF_ERROR(
      CheckBenchTensor("--length, --heads, --v_dim", {length, o.shape.heads, o.shape.v_head_dim}));
  o.sequences.lengths = {length};
  if (o.document_length > 0) {
    o.sequences.document_starts = {PackedDocuments(spec.seed, length, o.document_length)};
  }
  return BenchRun([o](Bench& bench) { return Run(bench, o); });
}

}  // namespace

BenchKind AttentionBench() {
  return {.name = "attention",
          .options = {"--heads", "--kv_heads", "--dim", "--v_dim", "--length", "--mask", "--window",
                      "--document_length"},
          .fields = {"device", "compute", "deterministic", "seed", "parallel"},
          .plan = Plan};
}

}  // namespace annulus
