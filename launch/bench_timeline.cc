// One attention layer over all ranks by one plan: when each step was predicted to run and when it ran.

#include <algorithm>
#include <cstdio>

#include "annulus/base/file.h"
#include "annulus/comm/exchange_timeline.h"
#include "annulus/train/plan_exchange.h"
#include "bench_layer.h"

namespace annulus {
namespace {

using LayerRun = std::function<absl::Status(ExchangeStats*)>;

// A pass of the layer as predicted and as measured.
struct TimedPass {
  PlannedPass planned;
  Simulation measured;
};

// The run with the median makespan of some. On every rank the same. Collective.
absl::StatusOr<Simulation> MedianRun(Bench& bench, const ExchangePlan& plan, const LayerRun& run) {
  constexpr int64_t kWarmUps = 2;
  Communicator world = bench.machine.mesh.world, cp = bench.machine.mesh.cp;
  StepClock clock(bench.ctx().device);
  std::vector<Simulation> runs;
  for (int64_t i = -kWarmUps; i < bench.repeats; ++i) {
    ANNULUS_RETURN_IF_ERROR(world.AgreeOk(clock.Start(bench.ctx(), cp)));
    ExchangeStats stats{.clock = &clock};
    ANNULUS_RETURN_IF_ERROR(world.AgreeOk(run(&stats)));
    ANNULUS_ASSIGN_OR_RETURN(Simulation measured, Agreed(bench, clock.Take(plan, cp)));
    if (i >= 0) runs.push_back(std::move(measured));
  }
  const auto median = runs.begin() + static_cast<int64_t>(runs.size()) / 2;
  std::nth_element(runs.begin(), median, runs.end(),
                   [](const Simulation& a, const Simulation& b) { return a.makespan < b.makespan; });
  return std::move(*median);
}

// Collective.
absl::StatusOr<TimedPass> TimePass(Bench& bench, const LayerOptions& o, const SequenceLayout& layout,
                                   BenchLayer& layer, Pass pass) {
  ExchangeOptions options = ExchangeFor(bench, o.shape);
  ANNULUS_ASSIGN_OR_RETURN(PlannedPass planned,
                           Agreed(bench, PlanPass(CaseOf(bench, layout, o.sequences, o.shape), pass, options,
                                                  bench.arguments.Last("--choice", ""))));
  const PlanCandidate& candidate = planned.candidates[planned.shown];
  options.forward = options.backward = {candidate.choice};
  options.forward_parts = options.backward_parts = {};
  options.transport = candidate.transport;
  AttentionGeometry geometry(layout, bench.machine.mesh.cp, options);
  geometry.SetBatch(o.sequences);
  ExchangeStats unrecorded;
  ANNULUS_RETURN_IF_ERROR(bench.machine.mesh.world.AgreeOk(layer.Forward(geometry, &unrecorded)));
  ANNULUS_ASSIGN_OR_RETURN(Simulation measured, MedianRun(bench, planned.plan, [&](ExchangeStats* stats) {
                             return pass == Pass::kForward ? layer.Forward(geometry, stats)
                                                           : layer.Backward(geometry, stats);
                           }));
  return TimedPass{.planned = std::move(planned), .measured = std::move(measured)};
}

double WorstOf(const std::vector<double>& ranks) { return *std::max_element(ranks.begin(), ranks.end()); }

void Report(const Bench& bench, const TimedPass& timed) {
  const PlanCandidate& candidate = timed.planned.candidates[timed.planned.shown];
  nlohmann::ordered_json json = {{"pass", Name(timed.planned.pass)},
                                 {"plan", candidate.name},
                                 {"transport", std::string(Name(candidate.transport))}};
  AddThrottle(bench.machine.exchange.throttle, &json);
  for (const Simulation* times : {&timed.planned.simulation, &timed.measured}) {
    const TimelineOverlap overlap = OverlapOf(timed.planned.plan, *times);
    json[Name(times->source)] = {{"ms", times->makespan * 1e3},
                                 {"exposed_ms", WorstOf(times->exposed) * 1e3},
                                 {"both_ways_ms", overlap.both_ways * 1e3},
                                 {"shorter_way_ms", overlap.shorter_way * 1e3},
                                 {"transfers_ms", overlap.transfers * 1e3},
                                 {"under_compute_ms", overlap.under_compute * 1e3}};
  }
  bench.Report(json);
}

void Print(const Bench& bench, const TimedPass& timed) {
  if (bench.machine.mesh.world.rank() != 0) return;
  const std::string throttled = Label(bench.machine.exchange.throttle);
  const PlanCandidate& candidate = timed.planned.candidates[timed.planned.shown];
  std::printf("%s by %s%s\n", Name(timed.planned.pass), std::string(Name(candidate.transport)).c_str(),
              throttled.empty() ? "" : absl::StrCat(", ", throttled).c_str());
  for (const Simulation* times : {&timed.planned.simulation, &timed.measured}) {
    std::printf("%s%s: %s\n", Timeline(timed.planned.plan, *times).c_str(), Name(times->source),
                OverlapText(OverlapOf(timed.planned.plan, *times)).c_str());
  }
  std::printf("\n");
}

absl::Status Run(Bench& bench, const LayerOptions& o) {
  Communicator world = bench.machine.mesh.world;
  if (bench.machine.mesh.shape.cp < 2) {
    return world.AgreeOk(Invalid("ranks=", bench.machine.mesh.shape.cp,
                                 ": expected at least 2 (launch/mpirun -n 2 annulus bench timeline)"));
  }
  const SequenceLayout layout(bench.spec.parallel.layout, o.length(), bench.machine.mesh.shape.cp);
  BenchLayer layer(bench, o.shape);
  ANNULUS_RETURN_IF_ERROR(layer.CheckMemory(layout));
  Announce(bench, o);
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(layer.Make(layout, bench.machine.mesh.at.cp)));
  std::vector<std::string> pictures;
  for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
    ANNULUS_ASSIGN_OR_RETURN(const TimedPass timed, TimePass(bench, o, layout, layer, pass));
    for (const Simulation* times : {&timed.planned.simulation, &timed.measured}) {
      pictures.push_back(TimelineSvg(timed.planned.plan, *times, Label(bench.machine.exchange.throttle)));
    }
    if (bench.arguments.Has("--json")) {
      Report(bench, timed);
    } else {
      Print(bench, timed);
    }
  }
  if (!bench.arguments.Has("--svg")) return absl::OkStatus();
  return world.AgreeOk(world.rank() == 0
                           ? WriteFileAtomically(bench.arguments.Last("--svg", ""), StackSvg(pictures))
                           : absl::OkStatus());
}

absl::StatusOr<BenchRun> Plan(const Arguments& arguments, const RunSpec& spec) {
  ANNULUS_ASSIGN_OR_RETURN(const LayerOptions o, ReadLayer(arguments, spec));
  return BenchRun([o](Bench& bench) { return Run(bench, o); });
}

}  // namespace

BenchKind TimelineBench() {
  BenchKind kind{.name = "timeline", .options = LayerOptionNames(), .fields = LayerFields(), .plan = Plan};
  for (const char* option : {"--choice", "--profile", "--transport", "--throttle", "--svg"})
    kind.options.emplace_back(option);
  return kind;
}

}  // namespace annulus
