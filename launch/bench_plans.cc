// One attention layer over all ranks with every exchange plan: what each sends, what it was predicted to
// take, what it takes, and how far its results are from those of one rank.

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "absl/strings/str_format.h"
#include "annulus/base/file.h"
#include "annulus/ops/elementwise.h"
#include "annulus/train/plan_exchange.h"
#include "annulus/train/report.h"
#include "bench_layer.h"

namespace annulus {
namespace {

// One plan in one pass.
struct PlanResult {
  PlanCandidate candidate;
  double seconds = 0;         // measured
  double waited_seconds = 0;  // of the rank that waited longest
  int64_t bytes_sent = 0;     // counted, of the rank that sends most
  double difference = 0;      // largest, of the results to those of one rank, relative to the largest value
};

class PlanRuns {
 public:
  PlanRuns(Bench& bench, const ContextAttentionShape& shape, SequenceBatch sequences)
      : bench_(bench),
        shape_(shape),
        sequences_(std::move(sequences)),
        layout_(bench.spec.parallel.layout, sequences_.lengths[0], bench.machine.mesh.shape.cp),
        layer_(bench, shape),
        transports_(
            std::make_shared<ExchangeTransports>(bench.machine.mesh.cp, bench.machine.exchange.throttle)) {}

  // The layer, and what one rank makes of it.
  absl::Status Make() {
    Context& ctx = bench_.ctx();
    ANNULUS_RETURN_IF_ERROR(layer_.Make(layout_, cp_rank()));
    for (const TensorRef& result : {layer_.out(), layer_.dq(), layer_.dkv()}) {
      reference_.push_back(ctx.saved.Allocate(result.dtype(), result.shape()));
      ANNULUS_RETURN_IF_ERROR(Zero(ctx, reference_.back()));
    }
    ArenaScope scope(ctx.saved);
    const SequenceLayout one(LayoutKind::kContiguous, sequences_.lengths[0], 1);
    AttentionGeometry geometry(one, MakeLoopbackGroup(1)[0]);
    geometry.SetBatch(sequences_);
    BenchLayer whole(bench_, shape_);
    ANNULUS_RETURN_IF_ERROR(whole.Make(one, 0));
    ExchangeStats stats;
    ANNULUS_RETURN_IF_ERROR(whole.Forward(geometry, &stats));
    ANNULUS_RETURN_IF_ERROR(whole.Backward(geometry, &stats));
    CopyRowsOfRank(ctx, whole.out(), layout_, cp_rank(), reference_[0]);
    CopyRowsOfRank(ctx, whole.dq(), layout_, cp_rank(), reference_[1]);
    CopyRowsOfRank(ctx, whole.dkv(), layout_, cp_rank(), reference_[2]);
    ctx.lane.Synchronize();
    return absl::OkStatus();
  }

  AttentionCase layer_case() const { return CaseOf(bench_, layout_, sequences_, shape_); }

  // Of a plan that can be, on its transport: both passes. Collective.
  absl::Status Measure(const PlanCandidate& plan, PlanResult* forward, PlanResult* backward) {
    ExchangeOptions options = ExchangeFor(bench_, shape_);
    options.forward = {plan.choice}, options.backward = {plan.choice};
    options.transport = plan.transport;
    AttentionGeometry geometry(layout_, bench_.machine.mesh.cp, options, transports_);
    geometry.SetBatch(sequences_);
    ANNULUS_RETURN_IF_ERROR(MeasurePass([&](ExchangeStats* stats) { return layer_.Forward(geometry, stats); },
                                        {{layer_.out(), reference_[0]}}, forward));
    return MeasurePass([&](ExchangeStats* stats) { return layer_.Backward(geometry, stats); },
                       {{layer_.dq(), reference_[1]}, {layer_.dkv(), reference_[2]}}, backward);
  }

 private:
  using Compared = std::vector<std::pair<TensorRef, TensorRef>>;  // result, reference

  int cp_rank() const { return bench_.machine.mesh.at.cp; }

  absl::Status MeasurePass(const std::function<absl::Status(ExchangeStats*)>& run, const Compared& results,
                           PlanResult* result) {
    Communicator world = bench_.machine.mesh.world;
    ExchangeStats once;
    ANNULUS_RETURN_IF_ERROR(world.AgreeOk(run(&once)));
    double worst[2] = {static_cast<double>(once.bytes_sent), 0};
    for (const auto& [got, want] : results) {
      ANNULUS_ASSIGN_OR_RETURN(const double difference, LargestDifference(bench_, got, want));
      worst[1] = std::max(worst[1], difference);
    }
    bench_.ctx().lane.Synchronize();
    (void)bench_.ctx().waits.TakeSeconds(WaitKind::kExchange);
    int64_t runs = 0;
    ANNULUS_ASSIGN_OR_RETURN(result->seconds, bench_.Seconds([&] {
      ++runs;
      return run(&once);
    }));
    bench_.ctx().lane.Synchronize();
    const double waited = bench_.ctx().waits.TakeSeconds(WaitKind::kExchange) / static_cast<double>(runs);
    ANNULUS_RETURN_IF_ERROR(world.AllReduce(TensorRef(worst, DType::kF64, Device{}, {2}), ReduceOp::kMax));
    ANNULUS_ASSIGN_OR_RETURN(result->waited_seconds, world.AllReduceValue(waited, ReduceOp::kMax));
    result->bytes_sent = static_cast<int64_t>(worst[0]);
    result->difference = worst[1];
    return absl::OkStatus();
  }

  Bench& bench_;
  ContextAttentionShape shape_;
  SequenceBatch sequences_;
  SequenceLayout layout_;
  BenchLayer layer_;
  const std::shared_ptr<ExchangeTransports> transports_;  // of all plans
  std::vector<TensorRef> reference_;  // of this rank's rows: output, gradients of queries and of KV
};

void Report(const Bench& bench, const PlannedPass& planned, const PlanResult& result) {
  nlohmann::ordered_json json = {{"pass", Name(planned.pass)},
                                 {"plan", result.candidate.name},
                                 {"transport", std::string(Name(result.candidate.transport))}};
  if (bench.machine.exchange.throttle.bytes_per_second > 0) {
    json["throttle_gb_per_second"] = bench.machine.exchange.throttle.bytes_per_second / 1e9;
  }
  if (result.candidate.refused.ok()) {
    json["bytes_sent"] = result.bytes_sent;
    json["predicted_bytes"] = result.candidate.bytes_sent;
    json["predicted_ms"] = result.candidate.seconds * 1e3;
    json["measured_ms"] = result.seconds * 1e3;
    json["waited_ms"] = result.waited_seconds * 1e3;
    json["difference_to_one_rank"] = result.difference;
  } else {
    json["refused"] = std::string(result.candidate.refused.message());
  }
  bench.Report(json);
}

void PrintTable(const Bench& bench, const PlannedPass& planned, const std::vector<PlanResult>& results) {
  if (bench.machine.mesh.world.rank() != 0) return;
  const std::string throttled = Label(bench.machine.exchange.throttle);
  std::printf("%s on %d ranks%s\n", Name(planned.pass), bench.machine.mesh.cp.size(),
              throttled.empty() ? "" : absl::StrCat(", ", throttled).c_str());
  size_t width = 4;
  for (const PlanResult& result : results) width = std::max(width, result.candidate.name.size());
  std::printf("  %-*s  %-11s  %10s  %11s  %11s  %11s  %10s\n", static_cast<int>(width), "plan", "transport",
              "sent", "predicted", "measured", "waited", "difference");
  for (const PlanResult& result : results) {
    const PlanCandidate& plan = result.candidate;
    std::printf("  %-*s  ", static_cast<int>(width), plan.name.c_str());
    if (plan.refused.ok()) {
      std::printf("%-11s  %10s  %8.3f ms  %8.3f ms  %8.3f ms  %10.2g\n",
                  std::string(Name(plan.transport)).c_str(),
                  FormatBytes(static_cast<double>(result.bytes_sent)).c_str(), plan.seconds * 1e3,
                  result.seconds * 1e3, result.waited_seconds * 1e3, result.difference);
    } else {
      std::printf("refused: %s\n", std::string(plan.refused.message()).c_str());
    }
  }
  const PlanResult& fastest = results.front();
  const auto chosen = std::min_element(results.begin(), results.end(), [](const auto& a, const auto& b) {
    const auto key = [](const PlanResult& r) {
      return std::tuple(!r.candidate.refused.ok(), !r.candidate.simulated, r.candidate.seconds);
    };
    return key(a) < key(b);
  });
  std::printf("sent, waited: of the rank with most\nfastest %s; AUTO takes %s, %.0f%% slower\n\n",
              fastest.candidate.name.c_str(), chosen->candidate.name.c_str(),
              100 * (chosen->seconds / fastest.seconds - 1));
}

// Those that can be, fastest first.
void SortByTime(std::vector<PlanResult>* results) {
  std::stable_sort(results->begin(), results->end(), [](const PlanResult& a, const PlanResult& b) {
    return std::pair(!a.candidate.refused.ok(), a.seconds) < std::pair(!b.candidate.refused.ok(), b.seconds);
  });
}

// Of the fastest plan of each pass, as predicted.
absl::Status Draw(const Bench& bench, const PlanRuns& plans, const ExchangeOptions& options,
                  const std::vector<std::pair<Pass, std::string>>& fastest) {
  if (!bench.arguments.Has("--svg")) return absl::OkStatus();
  std::vector<std::string> pictures;
  for (const auto& [pass, name] : fastest) {
    ANNULUS_ASSIGN_OR_RETURN(const PlannedPass planned, PlanPass(plans.layer_case(), pass, options, name));
    pictures.push_back(TimelineSvg(planned.plan, planned.simulation, Label(options.throttle)));
  }
  Communicator world = bench.machine.mesh.world;
  return world.AgreeOk(world.rank() == 0
                           ? WriteFileAtomically(bench.arguments.Last("--svg", ""), StackSvg(pictures))
                           : absl::OkStatus());
}

absl::Status Run(Bench& bench, const LayerOptions& o) {
  const ExchangeOptions options = ExchangeFor(bench, o.shape);
  PlanRuns plans(bench, o.shape, o.sequences);
  std::vector<PlannedPass> passes;
  for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
    ANNULUS_ASSIGN_OR_RETURN(
        PlannedPass planned,
        Agreed(bench, PlanPass(plans.layer_case(), pass, options, bench.arguments.Last("--choice", ""))));
    passes.push_back(std::move(planned));
  }
  Communicator world = bench.machine.mesh.world;
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(plans.Make()));

  const std::string& shown = passes[0].candidates[passes[0].shown].name;
  std::vector<std::vector<PlanResult>> results(passes.size());
  for (const PlanCandidate& forward : passes[0].candidates) {
    if (bench.arguments.Has("--choice") && forward.name != shown) continue;
    const auto backward = std::find_if(
        passes[1].candidates.begin(), passes[1].candidates.end(), [&](const PlanCandidate& candidate) {
          return candidate.choice == forward.choice && candidate.transport == forward.transport;
        });
    if (backward == passes[1].candidates.end()) continue;
    results[0].push_back({.candidate = forward});
    results[1].push_back({.candidate = *backward});
    if (!forward.refused.ok() || !backward->refused.ok()) continue;
    ANNULUS_RETURN_IF_ERROR(plans.Measure(forward, &results[0].back(), &results[1].back()));
  }
  std::vector<std::pair<Pass, std::string>> fastest;
  for (size_t i = 0; i < passes.size(); ++i) {
    SortByTime(&results[i]);
    fastest.emplace_back(passes[i].pass, results[i].front().candidate.name);
    if (!bench.arguments.Has("--json")) {
      PrintTable(bench, passes[i], results[i]);
      continue;
    }
    for (const PlanResult& result : results[i]) Report(bench, passes[i], result);
  }
  return Draw(bench, plans, options, fastest);
}

absl::StatusOr<BenchRun> Plan(const Arguments& arguments, const RunSpec& spec) {
  ANNULUS_ASSIGN_OR_RETURN(const LayerOptions o, ReadLayer(arguments, spec));
  return BenchRun([o](Bench& bench) { return Run(bench, o); });
}

}  // namespace

BenchKind PlansBench() {
  BenchKind kind{.name = "plans",
                 .options = LayerOptionNames(),
                 .fields = {"device", "compute", "deterministic", "seed", "parallel"},
                 .plan = Plan};
  for (const char* option : {"--choice", "--profile", "--transport", "--throttle", "--svg"})
    kind.options.emplace_back(option);
  return kind;
}

}  // namespace annulus
