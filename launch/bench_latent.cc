// One layer of latent attention over all ranks, without projections: latents that travel and are expanded by
// every rank that they come to, beside keys and values that are expanded at home and travel themselves.
// Either way by the KV ring, and by the plan that is predicted to be fastest where that is another one.

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "absl/strings/str_format.h"
#include "annulus/ops/elementwise.h"
#include "annulus/train/exchange.h"
#include "annulus/train/measure.h"
#include "annulus/train/report.h"
#include "bench_layer.h"

namespace annulus {
namespace {

constexpr double kSeconds = 2;         // of timed runs; two are timed at least
constexpr int64_t kComparedRows = 64;  // of each rank's results, the last ones

struct LatentOptions {
  ContextAttentionShape shape;   // with latents
  std::vector<int64_t> lengths;  // tokens a rank
  std::vector<LinkThrottle> throttles;
};

// One way of exchanging in one pass.
struct Row {
  LatentExchange way = LatentExchange::kLatent;
  PlanCandidate plan;
  double predicted_seconds = 0;  // with what is expanded at home
  ExchangeTime time = {};        // measured
  int64_t bytes_sent = 0;        // counted, of the rank that sends most
  double difference = 0;         // largest to the first row's results, relative to the largest value
};
const char* NameOf(LatentExchange way) {
  return way == LatentExchange::kLatent ? "latents" : "keys and values";
}

bool IsRing(const PlanCandidate& plan) {
  return plan.refused.ok() && plan.choice.kind == PlanKind::kKvRing && plan.choice.head_split == 1;
}

// The layer on one rank's rows, of random values that differ from rank to rank; memory of `saved`.
class LatentLayer {
 public:
  LatentLayer(Bench& bench, const ContextAttentionShape& shape) : bench_(bench), shape_(shape) {}

  absl::Status Make(int64_t rows) {
    const LatentShape& latent = *shape_.latent;
    const int64_t up_rows = shape_.heads * (latent.nope + latent.v);
    const uint64_t seed = 8 * static_cast<uint64_t>(bench_.machine.mesh.at.cp);
    ANNULUS_ASSIGN_OR_RETURN(q_, bench_.Random({rows, 1, shape_.heads * shape_.head_dim}, seed));
    ANNULUS_ASSIGN_OR_RETURN(latents_, bench_.Random({rows, 1, latent.row()}, seed + 1));
    ANNULUS_ASSIGN_OR_RETURN(dout_, bench_.Random({rows, 1, shape_.heads * shape_.v_head_dim}, seed + 2));
    ANNULUS_ASSIGN_OR_RETURN(weights_.up, bench_.Random({up_rows, latent.columns}, 3));
    // Keys and values of about one.
    ANNULUS_RETURN_IF_ERROR(
        Scale(bench_.ctx(), 1 / std::sqrt(static_cast<double>(latent.columns)), weights_.up));
    const DType wide = AccumOf(bench_.dtype());
    Arena& arena = bench_.ctx().saved;
    weights_.dup = arena.Allocate(wide, weights_.up.shape());
    out_ = arena.Allocate(bench_.dtype(), dout_.shape());
    lse_ = arena.Allocate(wide, {rows, 1, shape_.heads});
    dq_ = arena.Allocate(bench_.dtype(), q_.shape());
    dlatents_ = arena.Allocate(wide, latents_.shape());
    return Zero(bench_.ctx(), weights_.dup);
  }

  absl::Status Run(Pass pass, AttentionGeometry& geometry, ExchangeStats* stats) {
    if (pass == Pass::kForward) {
      return ContextAttentionForward(bench_.ctx(), geometry, shape_,
                                     {.q = q_, .kv = latents_, .out = out_, .lse = lse_, .latent = weights_},
                                     stats);
    }
    return ContextAttentionBackward(bench_.ctx(), geometry, shape_,
                                    {.q = q_,
                                     .kv = latents_,
                                     .out = out_,
                                     .lse = lse_,
                                     .dout = dout_,
                                     .dq = dq_,
                                     .dkv = dlatents_,
                                     .latent = weights_},
                                    stats);
  }
  std::vector<TensorRef> Results(Pass pass) const {
    return pass == Pass::kForward ? std::vector{out_} : std::vector{dq_, dlatents_};
  }

 private:
  Bench& bench_;
  ContextAttentionShape shape_;
  LatentWeights weights_;
  TensorRef q_, latents_, out_, lse_, dout_, dq_, dlatents_;
};

// All of one length and throttle.
class LatentCase {
 public:
  LatentCase(Bench& bench, const ContextAttentionShape& shape, int64_t rows,
             std::shared_ptr<ExchangeTransports> transports)
      : bench_(bench),
        shape_(shape),
        rows_(rows),
        layout_(bench.spec.parallel.layout, rows * bench.machine.mesh.shape.cp, bench.machine.mesh.shape.cp),
        sequences_{.batch = 1, .lengths = {layout_.length()}, .document_starts = {}},
        options_(ExchangeFor(bench, shape)),
        transports_(std::move(transports)),
        layer_(bench, shape) {
    options_.throttle = transports_->throttle();
  }

  absl::Status Run() {
    ArenaScope scope(bench_.ctx().saved);
    Communicator world = bench_.machine.mesh.world;
    // Queries and outputs, each with its gradient.
    const int64_t elements = 2 * layout_.local_rows() * shape_.heads * (shape_.head_dim + shape_.v_head_dim);
    ANNULUS_RETURN_IF_ERROR(
        bench_.CheckMemory(elements * SizeOf(bench_.dtype()), "lower --lengths, --heads or --dim"));
    ANNULUS_RETURN_IF_ERROR(world.AgreeOk(layer_.Make(layout_.local_rows())));
    for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
      absl::StatusOr<std::vector<Row>> rows = Rows(pass);
      ANNULUS_RETURN_IF_ERROR(world.AgreeOk(rows.status()));
      reference_.clear();
      for (Row& row : *rows) ANNULUS_RETURN_IF_ERROR(Measure(pass, &row));
      if (bench_.arguments.Has("--json")) {
        Report(pass, *rows);
      } else {
        Print(pass, *rows);
      }
    }
    return absl::OkStatus();
  }

 private:
  AttentionCase CaseOf(LatentExchange way) const {
    AttentionCase layer = annulus::CaseOf(bench_, layout_, sequences_, shape_);
    layer.latent = shape_.latent;
    return way == LatentExchange::kLatent ? layer : Expanded(layer);
  }

  // The KV ring of either way, where parallel.exchange leaves it open, then what is chosen if that is another
  // plan; and which way AUTO takes.
  absl::StatusOr<std::vector<Row>> Rows(Pass pass) {
    std::vector<Row> rings, chosen;
    LatentAlternatives ways;
    const AttentionCase layer = CaseOf(LatentExchange::kLatent);
    for (const LatentExchange way : {LatentExchange::kLatent, LatentExchange::kExpanded}) {
      const std::vector<PlanCandidate> ranked =
          RankPlans(CaseOf(way), pass, PlanOptionsOf(options_, pass), options_.machine);
      const PlanCandidate& best = ranked.front();
      ANNULUS_RETURN_IF_ERROR(best.refused);
      const auto ring = std::find_if(ranked.begin(), ranked.end(), IsRing);
      const PlanCandidate& first = ring == ranked.end() ? best : *ring;
      const bool latents = way == LatentExchange::kLatent;
      const double at_home = latents ? 0 : HomeExpansionSeconds(layer, pass, options_.machine);
      rings.push_back({.way = way, .plan = first, .predicted_seconds = first.seconds + at_home});
      if (best.name != first.name || best.transport != first.transport)
        chosen.push_back({.way = way, .plan = best, .predicted_seconds = best.seconds + at_home});
      (latents ? ways.latents : ways.expanded) = best;
    }
    decision_ = DecideLatents(layer, pass, ways, options_.machine);
    rings.insert(rings.end(), chosen.begin(), chosen.end());
    return rings;
  }

  absl::Status Measure(Pass pass, Row* row) {
    Communicator world = bench_.machine.mesh.world;
    ExchangeOptions options = options_;
    options.forward = options.backward = {row->plan.choice};
    options.forward_parts = options.backward_parts = {};
    options.transport = row->plan.transport;
    options.latents = row->way;
    AttentionGeometry geometry(layout_, bench_.machine.mesh.cp, options, transports_);
    geometry.SetBatch(sequences_);
    ExchangeStats once, stats;
    ANNULUS_RETURN_IF_ERROR(world.AgreeOk(layer_.Run(pass, geometry, &once)));
    ANNULUS_ASSIGN_OR_RETURN(const double difference, DifferenceToFirst(pass));
    ANNULUS_ASSIGN_OR_RETURN(
        row->time, bench_.MedianExchange({.warm_ups = 1, .timed = bench_.repeats, .seconds = kSeconds},
                                         [&] { return layer_.Run(pass, geometry, &stats); }));
    double worst[] = {static_cast<double>(once.bytes_sent), difference};
    ANNULUS_RETURN_IF_ERROR(world.AllReduce(TensorRef(worst, DType::kF64, Device{}, {2}), ReduceOp::kMax));
    row->bytes_sent = static_cast<int64_t>(worst[0]);
    row->difference = worst[1];
    return absl::OkStatus();
  }

  // Of the last rows. The first that is measured is what others are compared with.
  absl::StatusOr<double> DifferenceToFirst(Pass pass) {
    Context& ctx = bench_.ctx();
    const std::vector<TensorRef> results = layer_.Results(pass);
    const bool first = reference_.empty();
    double worst = 0;
    for (size_t i = 0; i < results.size(); ++i) {
      const int64_t rows = results[i].dim(0);
      const TensorRef last = results[i].Rows(std::max<int64_t>(0, rows - kComparedRows), rows);
      if (first) {
        reference_.push_back(ctx.saved.Allocate(last.dtype(), last.shape()));
        ANNULUS_RETURN_IF_ERROR(Copy(ctx, last, reference_.back()));
        continue;
      }
      ANNULUS_ASSIGN_OR_RETURN(const double difference, LargestDifference(bench_, last, reference_[i]));
      worst = std::max(worst, difference);
    }
    return worst;
  }

  static const Row& Fastest(const std::vector<Row>& rows, LatentExchange way) {
    return *std::min_element(rows.begin(), rows.end(), [&](const Row& a, const Row& b) {
      return std::pair(a.way != way, a.time.seconds) < std::pair(b.way != way, b.time.seconds);
    });
  }
  // Keys and values over latents: bytes of the first plan of each, and times of the fastest.
  static double BytesRatio(const std::vector<Row>& rows) {
    return static_cast<double>(rows[1].bytes_sent) /
           static_cast<double>(std::max<int64_t>(1, rows[0].bytes_sent));
  }
  static double TimeRatio(const std::vector<Row>& rows) {
    return Fastest(rows, LatentExchange::kExpanded).time.seconds /
           Fastest(rows, LatentExchange::kLatent).time.seconds;
  }

  void Report(Pass pass, const std::vector<Row>& rows) const {
    nlohmann::ordered_json common = {{"length_per_rank", rows_},   {"heads", shape_.heads},
                                     {"dim", shape_.latent->nope}, {"rope_dim", shape_.latent->rope},
                                     {"v_dim", shape_.latent->v},  {"latent_dim", shape_.latent->columns},
                                     {"pass", Name(pass)}};
    AddThrottle(options_.throttle, &common);
    for (const Row& row : rows) {
      nlohmann::ordered_json json = common;
      json.update({{"exchange", NameOf(row.way)},
                   {"plan", row.plan.name},
                   {"transport", std::string(Name(row.plan.transport))},
                   {"bytes_sent", row.bytes_sent},
                   {"predicted_ms", row.predicted_seconds * 1e3},
                   {"measured_ms", row.time.seconds * 1e3},
                   {"waited_ms", row.time.waited_seconds * 1e3},
                   {"difference_to_latents", row.difference}});
      bench_.Report(json);
    }
    common.update({{"times_fewer_bytes", BytesRatio(rows)},
                   {"times_as_fast", TimeRatio(rows)},
                   {"auto", std::string(Name(decision_))}});
    bench_.Report(common);
  }

  void Print(Pass pass, const std::vector<Row>& rows) const {
    if (bench_.machine.mesh.world.rank() != 0) return;
    const std::string throttled = Label(options_.throttle);
    std::printf("%s, %lld tokens on each of %d ranks, %lld heads%s\n", Name(pass),
                static_cast<long long>(rows_), layout_.ranks(), static_cast<long long>(shape_.heads),
                throttled.empty() ? "" : absl::StrCat(", ", throttled).c_str());
    size_t width = 4;
    for (const Row& row : rows) width = std::max(width, row.plan.name.size());
    const int columns = static_cast<int>(width);
    std::printf("  %-15s  %-*s  %-11s  %10s  %11s  %11s  %11s  %10s\n", "exchange", columns, "plan",
                "transport", "sent", "predicted", "measured", "waited", "difference");
    for (const Row& row : rows) {
      std::printf("  %-15s  %-*s  %-11s  %10s  %8.3f ms  %8.3f ms  %8.3f ms  %10.2g\n", NameOf(row.way),
                  columns, row.plan.name.c_str(), std::string(Name(row.plan.transport)).c_str(),
                  FormatBytes(static_cast<double>(row.bytes_sent)).c_str(), row.predicted_seconds * 1e3,
                  row.time.seconds * 1e3, row.time.waited_seconds * 1e3, row.difference);
    }
    std::printf("latents: %.1f times fewer bytes by the first plan, %.2f times as fast; AUTO takes %s\n\n",
                BytesRatio(rows), TimeRatio(rows), std::string(Name(decision_)).c_str());
    std::fflush(stdout);
  }

  Bench& bench_;
  ContextAttentionShape shape_;
  int64_t rows_;  // tokens a rank
  SequenceLayout layout_;
  SequenceBatch sequences_;
  ExchangeOptions options_;
  std::shared_ptr<ExchangeTransports> transports_;
  LatentLayer layer_;
  LatentDecision decision_;           // of the pass
  std::vector<TensorRef> reference_;  // results of the pass's first row, of the rows that are compared
};

absl::Status Run(Bench& bench, const LatentOptions& o) {
  const int ranks = bench.machine.mesh.shape.cp;
  if (ranks < 2) {
    return bench.machine.mesh.world.AgreeOk(
        Invalid("ranks=", ranks, ": expected at least 2 (launch/mpirun -n 2 annulus bench latent)"));
  }
  for (const LinkThrottle throttle : o.throttles) {
    const auto transports = std::make_shared<ExchangeTransports>(bench.machine.mesh.cp, throttle);
    for (const int64_t length : o.lengths) {
      LatentCase of_length(bench, o.shape, length, transports);
      ANNULUS_RETURN_IF_ERROR(of_length.Run());
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<LatentOptions> ReadOptions(const Arguments& arguments, const RunSpec& spec) {
  LatentOptions o;
  LatentShape latent;
  ANNULUS_ASSIGN_OR_RETURN(o.shape.heads, arguments.PositiveInt("--heads", 128));
  ANNULUS_ASSIGN_OR_RETURN(latent.nope, arguments.PositiveInt("--dim", 128));
  ANNULUS_ASSIGN_OR_RETURN(latent.rope, arguments.PositiveInt("--rope_dim", 64));
  ANNULUS_ASSIGN_OR_RETURN(latent.v, arguments.PositiveInt("--v_dim", latent.nope));
  ANNULUS_ASSIGN_OR_RETURN(latent.columns, arguments.PositiveInt("--latent_dim", 512));
  o.shape.kv_heads = 1;
  o.shape.head_dim = latent.nope + latent.rope, o.shape.v_head_dim = latent.v;
  o.shape.scale = 1 / std::sqrt(static_cast<double>(o.shape.head_dim));
  o.shape.latent = latent;
  const bool cpu = DeviceKindOf(spec.device) == DeviceKind::kCpu;
  ANNULUS_ASSIGN_OR_RETURN(o.lengths, ReadLengths(arguments, cpu ? "64,256" : "4096,8192,16384,32768"));
  ANNULUS_RETURN_IF_ERROR(CheckLayer(o.shape, o.lengths.back(), "--lengths", spec));
  ANNULUS_RETURN_IF_ERROR(CheckBenchTensor("--heads, --dim, --latent_dim",
                                           {o.shape.heads, latent.nope + latent.v, latent.columns}));
  const double rate = spec.parallel.exchange.throttle_gb_per_second;
  ANNULUS_ASSIGN_OR_RETURN(o.throttles, ReadThrottles(arguments, absl::StrCat(rate)));
  return o;
}

absl::StatusOr<BenchRun> Plan(const Arguments& arguments, const RunSpec& spec) {
  ANNULUS_ASSIGN_OR_RETURN(const LatentOptions o, ReadOptions(arguments, spec));
  return BenchRun([o](Bench& bench) { return Run(bench, o); });
}

}  // namespace

BenchKind LatentBench() {
  return {.name = "latent",
          .options = {"--heads", "--dim", "--rope_dim", "--v_dim", "--latent_dim", "--lengths", "--profile",
                      "--transport", "--throttle", "--throttles"},
          .fields = LayerFields(),
          .plan = Plan};
}

}  // namespace annulus
