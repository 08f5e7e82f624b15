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
  size_t place = 0;        // among the candidates: AUTO takes the first
  ExchangeTime time = {};  // measured
  int64_t bytes_sent = 0;  // counted, of the rank that sends most
  double difference = 0;   // largest, of the results to those of one rank, relative to the largest value
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

  // Of a plan that can be, on its transport. A backward pass begins from the output of the forward pass that
  // was measured last, whatever its plan. Collective.
  absl::Status Measure(Pass pass, PlanResult* result) {
    const PlanCandidate& plan = result->candidate;
    ExchangeOptions options = ExchangeFor(bench_, shape_);
    options.forward = options.backward = {plan.choice};
    options.forward_parts = options.backward_parts = {};
    options.transport = plan.transport;
    AttentionGeometry geometry(layout_, bench_.machine.mesh.cp, options, transports_);
    geometry.SetBatch(sequences_);
    if (pass == Pass::kForward) {
      return MeasurePass([&](ExchangeStats* stats) { return layer_.Forward(geometry, stats); },
                         {{layer_.out(), reference_[0]}}, result);
    }
    return MeasurePass([&](ExchangeStats* stats) { return layer_.Backward(geometry, stats); },
                       {{layer_.dq(), reference_[1]}, {layer_.dkv(), reference_[2]}}, result);
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
    ANNULUS_ASSIGN_OR_RETURN(result->time,
                             bench_.MedianExchange({.timed = bench_.repeats}, [&] { return run(&once); }));
    ANNULUS_RETURN_IF_ERROR(world.AllReduce(TensorRef(worst, DType::kF64, Device{}, {2}), ReduceOp::kMax));
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
  AddThrottle(bench.machine.exchange.throttle, &json);
  if (result.candidate.refused.ok()) {
    json["bytes_sent"] = result.bytes_sent;
    json["predicted_bytes"] = result.candidate.bytes_sent;
    json["predicted_ms"] = result.candidate.seconds * 1e3;
    json["measured_ms"] = result.time.seconds * 1e3;
    json["waited_ms"] = result.time.waited_seconds * 1e3;
    json["difference_to_one_rank"] = result.difference;
  } else {
    json["refused"] = std::string(result.candidate.refused.message());
  }
  bench.Report(json);
}

// Whether the candidates are all of AUTO's, so that the first is its choice.
bool ChosenByAuto(const Bench& bench, Pass pass) {
  return !bench.arguments.Has("--choice") && bench.spec.parallel.exchange.Of(pass).plan == PlanName::kAuto;
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
                  result.time.seconds * 1e3, result.time.waited_seconds * 1e3, result.difference);
    } else {
      std::printf("refused: %s\n", std::string(plan.refused.message()).c_str());
    }
  }
  const PlanResult& fastest = results.front();
  const auto chosen = std::min_element(results.begin(), results.end(),
                                       [](const auto& a, const auto& b) { return a.place < b.place; });
  std::printf("sent, waited: of the rank with most\nfastest %s; %s %s, %.0f%% slower\n\n",
              fastest.candidate.name.c_str(), ChosenByAuto(bench, planned.pass) ? "AUTO takes" : "predicted",
              chosen->candidate.name.c_str(), 100 * (chosen->time.seconds / fastest.time.seconds - 1));
}

// Those that can be, fastest first.
void SortByTime(std::vector<PlanResult>* results) {
  std::stable_sort(results->begin(), results->end(), [](const PlanResult& a, const PlanResult& b) {
    return std::pair(!a.candidate.refused.ok(), a.time.seconds) <
           std::pair(!b.candidate.refused.ok(), b.time.seconds);
  });
}

// Every candidate of a pass, of which one can be, or those that --choice names. Collective.
absl::StatusOr<std::vector<PlanResult>> MeasureAll(const Bench& bench, const PlannedPass& planned,
                                                   PlanRuns* plans) {
  const std::string& shown = planned.candidates[planned.shown].name;
  std::vector<PlanResult> results;
  for (const PlanCandidate& candidate : planned.candidates) {
    if (bench.arguments.Has("--choice") && candidate.name != shown) continue;
    results.push_back({.candidate = candidate, .place = results.size()});
    if (!candidate.refused.ok()) continue;
    ANNULUS_RETURN_IF_ERROR(plans->Measure(planned.pass, &results.back()));
  }
  SortByTime(&results);
  return results;
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
  // What all plans are compared with: every rank computes the whole.
  ANNULUS_RETURN_IF_ERROR(BenchLayer(bench, o.shape).CheckMemory({LayoutKind::kContiguous, o.length(), 1}));
  Announce(bench, o);
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

  // Each pass by itself: the two may choose from different plans.
  std::vector<std::pair<Pass, std::string>> fastest;
  for (const PlannedPass& planned : passes) {
    ANNULUS_ASSIGN_OR_RETURN(const std::vector<PlanResult> results, MeasureAll(bench, planned, &plans));
    fastest.emplace_back(planned.pass, results.front().candidate.name);
    if (!bench.arguments.Has("--json")) {
      PrintTable(bench, planned, results);
      continue;
    }
    for (const PlanResult& result : results) Report(bench, planned, result);
  }
  return Draw(bench, plans, options, fastest);
}

absl::StatusOr<BenchRun> Plan(const Arguments& arguments, const RunSpec& spec) {
  ANNULUS_ASSIGN_OR_RETURN(const LayerOptions o, ReadLayer(arguments, spec));
  return BenchRun([o](Bench& bench) { return Run(bench, o); });
}

}  // namespace

BenchKind PlansBench() {
  BenchKind kind{.name = "plans", .options = LayerOptionNames(), .fields = LayerFields(), .plan = Plan};
  for (const char* option : {"--choice", "--profile", "--transport", "--throttle", "--svg"})
    kind.options.emplace_back(option);
  return kind;
}

}  // namespace annulus
