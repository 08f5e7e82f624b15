#include "bench_layer.h"

#include <algorithm>
#include <cmath>

#include "annulus/base/random.h"
#include "annulus/device/transfer.h"
#include "annulus/ops/elementwise.h"
#include "annulus/train/exchange.h"

namespace annulus {

namespace {

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

absl::StatusOr<ContextAttentionShape> ShapeOf(const Arguments& arguments) {
  ContextAttentionShape shape;
  ANNULUS_ASSIGN_OR_RETURN(shape.heads, arguments.PositiveInt("--heads", 16));
  ANNULUS_ASSIGN_OR_RETURN(shape.kv_heads, arguments.PositiveInt("--kv_heads", shape.heads));
  ANNULUS_ASSIGN_OR_RETURN(shape.head_dim, arguments.PositiveInt("--dim", 128));
  ANNULUS_ASSIGN_OR_RETURN(shape.v_head_dim, arguments.PositiveInt("--v_dim", shape.head_dim));
  shape.scale = 1 / std::sqrt(static_cast<double>(shape.head_dim));
  if (shape.heads % shape.kv_heads != 0) {
    return Invalid("--kv_heads=", shape.kv_heads, ": expected a divisor of --heads=", shape.heads);
  }
  return shape;
}

// --window and --document_length belong to the mask of their name.
absl::Status ReadMask(const Arguments& arguments, LayerOptions* o) {
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

}  // namespace

int64_t LayerOptions::documents() const {
  if (sequences.document_starts.empty()) return 0;
  const std::vector<int64_t>& starts = sequences.document_starts[0];
  int64_t count = 0;
  for (size_t i = 0; i < starts.size(); ++i) count += starts[i] == static_cast<int64_t>(i);
  return count;
}

double LayerOptions::forward_tflop() const {
  return 2e-12 * static_cast<double>(pairs()) *
         static_cast<double>(shape.heads * (shape.head_dim + shape.v_head_dim));
}

void Announce(const Bench& bench, const LayerOptions& o) {
  const double tflop = o.forward_tflop();
  bench.Announce(absl::StrCat("attention over ", o.length(), " tokens: ", absl::SixDigits(tflop),
                              " TFLOP forward, ", absl::SixDigits(LayerOptions::kBackwardFlops * tflop),
                              " backward"));
}

std::vector<absl::string_view> LayerOptionNames() {
  return {"--heads", "--kv_heads", "--dim", "--v_dim", "--length", "--mask", "--window", "--document_length"};
}

std::vector<absl::string_view> LayerFields() {
  return {"device", "compute",         "deterministic",    "attention_kernel",
          "seed",   "parallel.layout", "parallel.exchange"};
}

absl::StatusOr<LayerOptions> ReadLayer(const Arguments& arguments, const RunSpec& spec) {
  LayerOptions o;
  ANNULUS_ASSIGN_OR_RETURN(o.shape, ShapeOf(arguments));
  ANNULUS_ASSIGN_OR_RETURN(const int64_t length, arguments.PositiveInt("--length", 32768, kMostTokens));
  ANNULUS_RETURN_IF_ERROR(ReadMask(arguments, &o));
  ANNULUS_RETURN_IF_ERROR(CheckLayer(o.shape, length, "--length", spec));
  o.sequences = PackedSequence(spec.seed, length, o.document_length, o.sequences.visibility);
  return o;
}

absl::Status CheckLayer(const ContextAttentionShape& shape, int64_t length, absl::string_view length_option,
                        const RunSpec& spec) {
  const DeviceKind device = DeviceKindOf(spec.device);
  if (!AttentionSupports(device, DTypeOf(spec.compute), shape.head_dim, shape.v_head_dim)) {
    const bool bf16 = spec.compute == ComputeType::kBF16;
    return Invalid("--dim=", shape.head_dim, " --v_dim=", shape.v_head_dim, ": expected ",
                   bf16 ? "64/64, 128/128 or 192/128 with compute=BF16 (--set compute=F32 takes more)"
                        : "at most 256 on GPUs");
  }
  ANNULUS_RETURN_IF_ERROR(CheckBenchTensor(absl::StrCat(length_option, ", --heads, --dim"),
                                           {length, shape.heads, shape.head_dim}));
  return CheckBenchTensor(absl::StrCat(length_option, ", --heads, --v_dim"),
                          {length, shape.heads, shape.v_head_dim});
}

SequenceBatch PackedSequence(uint64_t seed, int64_t length, int64_t document_length, Visibility visibility) {
  SequenceBatch sequences{.batch = 1, .lengths = {length}, .document_starts = {}, .visibility = visibility};
  if (document_length > 0) {
    sequences.document_starts = {PackedDocuments(seed, length, document_length)};
  }
  return sequences;
}

AttentionCase CaseOf(const Bench& bench, const SequenceLayout& layout, const SequenceBatch& sequences,
                     const ContextAttentionShape& shape) {
  return {.layout = layout,
          .sequences = sequences,
          .heads = shape.heads,
          .kv_heads = shape.kv_heads,
          .head_dim = shape.head_dim,
          .v_head_dim = shape.v_head_dim,
          .window = shape.window,
          .device = bench.ctx().device.kind,
          .dtype = bench.dtype(),
          .determinism = bench.ctx().determinism,
          .hopper = bench.ctx().hopper,
          .kernel = bench.ctx().attention};
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

absl::StatusOr<double> LargestDifference(const Bench& bench, TensorRef got, TensorRef want) {
  Context& ctx = bench.ctx();
  const DType wide = AccumOf(got.dtype());
  const Tensor got_host(Device{}, wide, got.shape()), want_host(Device{}, wide, got.shape());
  for (const auto& [from, to] : {std::pair(got, got_host.ref()), {want, want_host.ref()}}) {
    ArenaScope scope(ctx.scratch);
    const TensorRef copy = ctx.scratch.Allocate(wide, from.shape());
    ANNULUS_RETURN_IF_ERROR(Cast(ctx, from, copy));
    Download(ctx, copy, to.raw());
  }
  return VisitFloat(wide, [&]<class T>() {
    double difference = 0, largest = 0;
    for (int64_t i = 0; i < got.elements(); ++i) {
      const double g = got_host.ref().data<T>()[i], w = want_host.ref().data<T>()[i];
      difference = std::max(difference, std::isfinite(g) ? std::abs(g - w) : HUGE_VAL);
      largest = std::max(largest, std::abs(w));
    }
    return largest > 0 ? difference / largest : difference;
  });
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

absl::Status BenchLayer::CheckMemory(const SequenceLayout& layout) const {
  const int64_t q = shape_.heads * shape_.head_dim, v = shape_.heads * shape_.v_head_dim;
  const int64_t kv = shape_.kv_heads * (shape_.head_dim + shape_.v_head_dim);
  // Each with its gradient; and one operand of all ranks.
  const int64_t elements =
      std::max(2 * (q + kv + v) * layout.local_rows(), std::max({q, kv, v}) * layout.padded_length());
  return bench_.CheckMemory(elements * SizeOf(bench_.dtype()), "fewer tokens, heads or dims, or more ranks");
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
