// `annulus bench`: rates of the parts and of the whole, beside their ceilings.

#include <algorithm>
#include <cstdio>

#include "annulus/base/file.h"
#include "annulus/device/stream_timer.h"
#include "annulus/train/config.h"
#include "bench.h"

namespace annulus {

absl::StatusOr<double> Bench::Seconds(const std::function<absl::Status()>& fn) const {
  constexpr int kWarmUps = 2;
  ANNULUS_ASSIGN_OR_RETURN(const int64_t repeats, Int("--repeats", 10));
  Communicator world = machine.mesh.world;
  StreamTimer timer(ctx());
  std::vector<double> seconds;
  for (int64_t i = -kWarmUps; i < repeats; ++i) {
    ctx().lane.Synchronize();
    ANNULUS_RETURN_IF_ERROR(world.Barrier());
    timer.Begin();
    const absl::Status status = fn();
    const double here = timer.Seconds();
    ANNULUS_RETURN_IF_ERROR(world.AgreeOk(status));
    ANNULUS_ASSIGN_OR_RETURN(const double took, world.AllReduceValue(here, ReduceOp::kMax));
    if (i >= 0) seconds.push_back(took);
  }
  std::nth_element(seconds.begin(), seconds.begin() + repeats / 2, seconds.end());
  return seconds[static_cast<size_t>(repeats / 2)];
}

void Bench::Report(const nlohmann::ordered_json& result) const {
  if (machine.mesh.world.rank() != 0) return;
  nlohmann::ordered_json line;
  line["bench"] = arguments.operand();
  line["device"] = ctx().device.kind == DeviceKind::kCuda ? gpu.name : "cpu";
  line["ranks"] = machine.mesh.world.size();
  line["compute"] = std::string(Name(dtype()));
  line.update(result);
  if (arguments.Has("--json")) {
    std::printf("%s\n", line.dump().c_str());
  } else {
    std::string text;
    for (const auto& [key, value] : line.items()) {
      const bool number = value.is_number_float();
      absl::StrAppend(&text, text.empty() ? "" : "  ", key, "=",
                      number              ? absl::StrCat(absl::SixDigits(value.get<double>()))
                      : value.is_string() ? value.get<std::string>()
                                          : value.dump());
    }
    std::printf("%s\n", text.c_str());
  }
  std::fflush(stdout);
}

namespace {

absl::StatusOr<RunSpec> SpecFor(const Arguments& arguments, int world) {
  RunSpec spec;
  std::string text =
      "name: \"bench\" model { pattern: \"A\" d_model: 64 attention { heads: 1 } mlp { d_ff: 1 } } "
      "data { train { text { path: \"-\" } } seq_len: 1 } "
      "optim { adamw { lr: 1 } steps: 1 sequences_per_step: 1 }";
  std::string name = "bench";
  if (arguments.Has("--config")) {
    name = arguments.Last("--config", "");
    ANNULUS_ASSIGN_OR_RETURN(text, ReadFile(name));
  }
  std::vector<std::string> overrides;
  if (!arguments.Has("--config")) overrides.push_back(absl::StrCat("parallel.cp=", world));
  for (const std::string& set : arguments.All("--set")) overrides.push_back(set);
  ANNULUS_ASSIGN_OR_RETURN(ResolvedConfig config, LoadConfig(name, text, overrides, world));
  ANNULUS_RETURN_IF_ERROR(ResolveDevice(&config.spec));
  return config.spec;
}

std::vector<BenchKind> Kinds() {
  const auto plan_exchange = [](const Arguments& arguments, const RunSpec&) -> absl::StatusOr<BenchRun> {
    ANNULUS_RETURN_IF_ERROR(arguments.PositiveInt("--bytes").status());
    return BenchRun(BenchExchange);
  };
  return {
      GemmBench(),
      AttentionBench(),
      {.name = "exchange", .options = {"--bytes"}, .fields = {"device", "parallel"}, .plan = plan_exchange},
      StepBench()};
}

struct PlannedBench {
  RunSpec spec;
  BenchRun run;
};

// All that can be said without a device.
absl::StatusOr<PlannedBench> PlanBench(const Arguments& arguments, int world) {
  const std::vector<BenchKind> kinds = Kinds();
  const auto kind = std::find_if(kinds.begin(), kinds.end(),
                                 [&](const BenchKind& k) { return arguments.operand() == k.name; });
  if (kind == kinds.end()) {
    return Invalid("annulus bench ", arguments.operand(),
                   ": expected one of gemm, attention, exchange, step");
  }
  ANNULUS_RETURN_IF_ERROR(CheckBenchOptions(*kind, arguments));
  PlannedBench planned;
  ANNULUS_ASSIGN_OR_RETURN(planned.spec, SpecFor(arguments, world));
  ANNULUS_ASSIGN_OR_RETURN(planned.run, kind->plan(arguments, planned.spec));
  return planned;
}

absl::Status RunOn(Communicator world, const Arguments& arguments) {
  const absl::StatusOr<PlannedBench> planned = PlanBench(arguments, world.size());
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(planned.status()));
  ANNULUS_ASSIGN_OR_RETURN(const Device device, PlaceRank(world, planned->spec));
  ANNULUS_ASSIGN_OR_RETURN(Machine machine, SetUpMachine(world, planned->spec, device));
  Bench bench{arguments, planned->spec, std::move(machine), {}};
  if (device.kind == DeviceKind::kCuda) {
    ANNULUS_ASSIGN_OR_RETURN(bench.gpu, DescribeGpu(device.index));
  }
  return planned->run(bench);
}

absl::Status Run(const Arguments& arguments, const std::string&) {
  ANNULUS_ASSIGN_OR_RETURN(MpiSession session, MpiSession::Start(nullptr, nullptr));
  const absl::Status status = RunOn(session.world(), arguments);
  if (status.ok()) return status;
  if (!IsAgreed(status)) {
    std::fprintf(stderr, "error: rank %d: %s\n", session.world().rank(),
                 std::string(status.message()).c_str());
    MpiSession::Abort(1);
  }
  return session.world().rank() == 0 ? status : absl::CancelledError();
}

}  // namespace

Command BenchCommand() {
  return {
      {"bench",
       "WHAT",
       "measures gemm, attention, exchange or step, beside the ceiling of each",
       {{"--json", Option::Takes::kNothing, "", "one JSON object a result"},
        {"--repeats", Option::Takes::kValue, "N", "timed runs, of which the median counts (default 10)"},
        {"--m", Option::Takes::kValue, "M", "gemm: rows (default 8192, on CPUs 1024); --n, --k: default M"},
        {"--n", Option::Takes::kValue, "N", "gemm: columns"},
        {"--k", Option::Takes::kValue, "K", "gemm: inner size"},
        {"--heads", Option::Takes::kValue, "H", "attention: query heads (default 16)"},
        {"--kv_heads", Option::Takes::kValue, "H", "attention: KV heads (default: heads)"},
        {"--dim", Option::Takes::kValue, "D", "attention: head dim (default 128)"},
        {"--v_dim", Option::Takes::kValue, "D", "attention: head dim of values (default: dim)"},
        {"--length", Option::Takes::kValue, "S", "attention: tokens over all ranks (default 32768)"},
        {"--mask", Option::Takes::kValue, "MASK", "attention: causal (default), full, window or documents"},
        {"--window", Option::Takes::kValue, "W", "attention: keys that a query sees with --mask window"},
        {"--document_length", Option::Takes::kValue, "L",
         "attention: mean length of the packed documents of --mask documents"},
        {"--bytes", Option::Takes::kValue, "B", "exchange: of a message (default: 1, 4, 16, 64 and 128 MiB)"},
        {"--config", Option::Takes::kValue, "FILE", "step: the configuration; its data is not read"},
        {"--set", Option::Takes::kValue, "PATH=VALUE",
         "overrides a field that means something to WHAT (device, compute, parallel.layout, ...); "
         "repeatable"}}},
      Run};
}

}  // namespace annulus
