// Attention of one layer over all ranks, without projections: the exchange of blocks and the block kernels.

#include <algorithm>

#include "annulus/base/check.h"
#include "bench_layer.h"

namespace annulus {
namespace {

const AttentionGeometry::Schedule& ScheduleOf(const AttentionGeometry& geometry, Pass pass) {
  const auto& schedules = geometry.schedules();
  const auto found = std::find_if(schedules.begin(), schedules.end(),
                                  [&](const auto& each) { return each.second.plan.pass == pass; });
  ANNULUS_CHECK(found != schedules.end()) << "no schedule";
  return found->second;
}

// "kv_ring toward lower ranks by host"
std::string PlanOf(const AttentionGeometry::Schedule& schedule) {
  return absl::StrCat(schedule.plan.name, " by ", Name(schedule.choice.transport));
}

// Medians of forward, of backward, and of one after the other.
struct Times {
  double forward = 0, backward = 0, both = 0;
};

absl::StatusOr<Times> Measure(Bench& bench, AttentionGeometry& geometry, BenchLayer& layer) {
  Times seconds;
  ExchangeStats stats;
  ANNULUS_ASSIGN_OR_RETURN(seconds.forward, bench.Seconds([&] { return layer.Forward(geometry, &stats); }));
  ANNULUS_ASSIGN_OR_RETURN(seconds.backward, bench.Seconds([&] { return layer.Backward(geometry, &stats); }));
  ANNULUS_ASSIGN_OR_RETURN(seconds.both, bench.Seconds([&]() -> absl::Status {
    ANNULUS_RETURN_IF_ERROR(layer.Forward(geometry, &stats));
    return layer.Backward(geometry, &stats);
  }));
  return seconds;
}

void Report(const Bench& bench, const AttentionGeometry& geometry, const LayerOptions& o,
            const Times& seconds, double gemm) {
  const ContextAttentionShape& shape = o.shape;
  const double flops = o.forward_tflop() / bench.machine.mesh.shape.cp;
  const AttentionGeometry::Schedule &forward = ScheduleOf(geometry, Pass::kForward),
                                    &backward = ScheduleOf(geometry, Pass::kBackward);
  nlohmann::ordered_json result = {{"length", o.length()},       {"heads", shape.heads},
                                   {"kv_heads", shape.kv_heads}, {"dim", shape.head_dim},
                                   {"v_dim", shape.v_head_dim},  {"mask", o.mask}};
  if (shape.window > 0) result["window"] = shape.window;
  if (o.document_length > 0) {
    result["document_length"] = o.document_length;
    result["documents"] = o.documents();
  }
  result.update({{"pairs", o.pairs()},
                 {"forward_kernel", forward.kernels},
                 {"backward_kernel", backward.kernels},
                 {"forward_plan", PlanOf(forward)},
                 {"backward_plan", PlanOf(backward)},
                 {"forward_ms", seconds.forward * 1e3},
                 {"backward_ms", seconds.backward * 1e3},
                 {"both_ms", seconds.both * 1e3},
                 {"forward_tflops", flops / seconds.forward},
                 {"backward_tflops", LayerOptions::kBackwardFlops * flops / seconds.backward},
                 {"both_tflops", (1 + LayerOptions::kBackwardFlops) * flops / seconds.both},
                 {"gemm_tflops", gemm}});
  AddThrottle(bench.machine.exchange.throttle, &result);
  bench.Report(result);
}

absl::Status Run(Bench& bench, const LayerOptions& o) {
  const SequenceLayout layout(bench.spec.parallel.layout, o.length(), bench.machine.mesh.shape.cp);
  BenchLayer layer(bench, o.shape);
  ANNULUS_RETURN_IF_ERROR(layer.CheckMemory(layout));
  Announce(bench, o);
  AttentionGeometry geometry(layout, bench.machine.mesh.cp, ExchangeFor(bench, o.shape));
  geometry.SetBatch(o.sequences);
  ANNULUS_RETURN_IF_ERROR(layer.Make(layout, bench.machine.mesh.at.cp));
  ANNULUS_ASSIGN_OR_RETURN(const Times seconds, Measure(bench, geometry, layer));
  const int64_t size = CeilingSize(bench.ctx().device.kind);
  ANNULUS_ASSIGN_OR_RETURN(const double gemm, GemmRate(bench, size, size, size));
  Report(bench, geometry, o, seconds, gemm);
  return absl::OkStatus();
}

absl::StatusOr<BenchRun> Plan(const Arguments& arguments, const RunSpec& spec) {
  ANNULUS_ASSIGN_OR_RETURN(const LayerOptions o, ReadLayer(arguments, spec));
  return BenchRun([o](Bench& bench) { return Run(bench, o); });
}

}  // namespace

BenchKind AttentionBench() {
  BenchKind kind{.name = "attention", .options = LayerOptionNames(), .fields = LayerFields(), .plan = Plan};
  for (const char* option : {"--profile", "--transport", "--throttle"}) kind.options.emplace_back(option);
  return kind;
}

}  // namespace annulus
