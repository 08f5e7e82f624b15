// `annulus bench`: rates of the parts and of the whole, beside their ceilings.

#include <algorithm>
#include <cstdio>
#include <optional>

#include "annulus/train/report.h"
#include "bench.h"
#include "collective.h"

namespace annulus {

absl::StatusOr<double> Bench::Seconds(const std::function<absl::Status()>& fn) const {
  return SecondsOf(ctx(), machine.mesh.world, {.timed = repeats}, fn);
}

absl::StatusOr<ExchangeTime> Bench::MedianExchange(const Repeats& repeats,
                                                   const std::function<absl::Status()>& fn) const {
  Communicator world = machine.mesh.world;
  std::vector<ExchangeTime> runs;
  double total = 0;
  ctx().lane.Synchronize();
  (void)ctx().waits.TakeSeconds(WaitKind::kExchange);
  for (int64_t i = -repeats.warm_ups; i < repeats.timed; ++i) {
    if (i >= 2 && total >= repeats.seconds) break;  // on all ranks: they agree on what each took
    ExchangeTime run;
    ANNULUS_ASSIGN_OR_RETURN(run.seconds, SecondsOf(ctx(), world, {.warm_ups = 0, .timed = 1}, fn));
    ctx().lane.Synchronize();
    const double waited = ctx().waits.TakeSeconds(WaitKind::kExchange);
    ANNULUS_ASSIGN_OR_RETURN(run.waited_seconds, world.AllReduceValue(waited, ReduceOp::kMax));
    if (i < 0) continue;
    runs.push_back(run);
    total += run.seconds;
  }
  const auto median = runs.begin() + static_cast<int64_t>(runs.size()) / 2;
  std::nth_element(runs.begin(), median, runs.end(),
                   [](const ExchangeTime& a, const ExchangeTime& b) { return a.seconds < b.seconds; });
  return *median;
}

namespace {

// Key of results of throttled links.
constexpr char kThrottle[] = "throttle_gb_per_second";

}  // namespace

void AddThrottle(LinkThrottle throttle, nlohmann::ordered_json* result) {
  if (throttle.bytes_per_second > 0) (*result)[kThrottle] = throttle.bytes_per_second / 1e9;
}

void Bench::Announce(absl::string_view what) const {
  if (machine.mesh.world.rank() != 0) return;
  std::fprintf(stderr, "measuring %s\n",
               absl::StrCat(what, ", --repeats ", repeats, ", ", CountText(machine.mesh.world.size(), "rank"))
                   .c_str());
}

absl::Status Bench::CheckMemory(int64_t bytes, absl::string_view cure) const {
  const Arena& arena = ctx().saved;  // holds on to what an earlier measurement has released
  const int64_t unused = arena.capacity_bytes() - arena.used_bytes();
  return annulus::CheckMemory(machine.mesh.world, ctx().device, bytes - unused, "a rank is to hold at least",
                              cure);
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
    std::string text = Label({line.value(kThrottle, 0.0) * 1e9});
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

absl::StatusOr<TensorRef> Bench::Random(const Shape& shape, uint64_t seed) const {
  return RandomTensor(ctx(), ctx().saved, dtype(), shape, seed);
}

namespace {

std::optional<BenchKind> KindOf(absl::string_view name) {
  for (const BenchKind& kind : {GemmBench(), AttentionBench(), PlansBench(), AutoBench(), LatentBench(),
                                TimelineBench(), ExchangeBench(), StepBench()}) {
    if (name == kind.name) return kind;
  }
  return std::nullopt;
}

absl::Status CheckKind(const std::optional<BenchKind>& kind, const Arguments& arguments) {
  if (kind.has_value()) return CheckBenchOptions(*kind, arguments);
  return Invalid("annulus bench ", arguments.operand(),
                 ": expected one of gemm, attention, plans, auto, latent, timeline, exchange, step");
}

absl::Status RunOn(Communicator world, const Arguments& arguments) {
  const std::optional<BenchKind> kind = KindOf(arguments.operand());
  ANNULUS_ASSIGN_OR_RETURN(const RunSpec spec, SpecOf(arguments, world, CheckKind(kind, arguments)));
  const absl::StatusOr<BenchRun> run = kind->plan(arguments, spec);
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(run.status()));
  ANNULUS_RETURN_IF_ERROR(
      world.AgreeOk(world.rank() == 0 ? CheckOutputFile(arguments, "--svg") : absl::OkStatus()));
  ANNULUS_ASSIGN_OR_RETURN(const Device device, PlaceRank(world, spec));
  ANNULUS_ASSIGN_OR_RETURN(Machine machine, SetUpWatchedMachine(world, spec, device));
  ANNULUS_ASSIGN_OR_RETURN(const int64_t repeats, ReadRepeats(arguments));
  Bench bench{arguments, spec, std::move(machine), repeats, {}};
  if (device.kind == DeviceKind::kCuda) {
    ANNULUS_ASSIGN_OR_RETURN(bench.gpu, DescribeGpu(device.index));
  }
  return (*run)(bench);
}

absl::Status Run(const Arguments& arguments, const std::string&) {
  return OnAllRanks([&](Communicator world) { return RunOn(std::move(world), arguments); });
}

}  // namespace

namespace {

// With the options alone that mean something to the kind that is named, if one is.
CommandSpec SpecFor(const std::vector<std::string>& args) {
  CommandSpec spec = BenchCommand().spec;
  for (const std::string& arg : args) {
    const std::optional<BenchKind> kind = KindOf(arg);
    if (!kind.has_value()) continue;
    const std::vector<absl::string_view> known = KnownOptions(*kind);
    std::erase_if(spec.options, [&](const Option& option) {
      return std::find(known.begin(), known.end(), option.name) == known.end();
    });
    spec.operand = kind->name;
    break;
  }
  return spec;
}

}  // namespace

Command BenchCommand() {
  return {
      {"bench",
       "WHAT",
       "measures gemm, attention, plans, auto, latent, timeline, exchange or step, beside the ceiling of "
       "each",
       {{"--json", Option::Takes::kNothing, "", "one JSON object a result"},
        {"--repeats", Option::Takes::kValue, "N", "timed runs, of which the median counts (default 10)"},
        {"--m", Option::Takes::kValue, "M", "gemm: rows (default 8192, on CPUs 1024); --n, --k: default M"},
        {"--n", Option::Takes::kValue, "N", "gemm: columns"},
        {"--k", Option::Takes::kValue, "K", "gemm: inner size"},
        {"--heads", Option::Takes::kValue, "H",
         "attention, plans, timeline: query heads (default 16); auto: H/KV,... (default 16/16,16/4,16/1); "
         "latent: default 128"},
        {"--lengths", Option::Takes::kValue, "S,...",
         "auto: in place of --length (default 8192,32768); latent: tokens a rank (default 4096 to 32768, on "
         "CPUs 64,256)"},
        {"--masks", Option::Takes::kValue, "MASK,...",
         "auto: in place of --mask, of causal, full and documents (default all)"},
        {"--throttles", Option::Takes::kValue, "GB/S,...",
         "auto, latent: in place of --throttle; 0 is full speed (default 0)"},
        {"--all", Option::Takes::kNothing, "", "auto: times plans that are predicted far slower, too"},
        {"--kv_heads", Option::Takes::kValue, "H", "attention, plans, timeline: KV heads (default: heads)"},
        {"--dim", Option::Takes::kValue, "D",
         "attention, plans, auto, timeline: head dim; latent: without positions (default 128)"},
        {"--rope_dim", Option::Takes::kValue, "D", "latent: head dim that carries positions (default 64)"},
        {"--latent_dim", Option::Takes::kValue, "R", "latent: columns of the latent (default 512)"},
        {"--v_dim", Option::Takes::kValue, "D", "head dim of values (default: dim)"},
        {"--length", Option::Takes::kValue, "S",
         "attention, plans, timeline: tokens over all ranks (default 32768)"},
        {"--mask", Option::Takes::kValue, "MASK",
         "attention, plans, timeline: causal (default), full, window or documents"},
        {"--window", Option::Takes::kValue, "W",
         "attention, plans, timeline: keys that a query sees with --mask window"},
        {"--document_length", Option::Takes::kValue, "L",
         "mean length of packed documents (auto: default an eighth of the length)"},
        {"--choice", Option::Takes::kValue, "NAME",
         "plans, timeline: only this one of those that bench plans lists"},
        {"--profile", Option::Takes::kValue, "FILE", "machine profile that plans are predicted by"},
        {"--transport", Option::Takes::kValue, "T", "BEST, HOST, NCCL or COPY_ENGINE"},
        {"--throttle", Option::Takes::kValue, "GB/S", "artificial rate of each link"},
        {"--svg", Option::Takes::kValue, "FILE",
         "plans: draws the timelines of the fastest, as predicted; timeline: of both passes, as measured, "
         "too"},
        {"--bytes", Option::Takes::kValue, "B", "exchange: of a message (default: 1, 4, 16, 64 and 128 MiB)"},
        {"--config", Option::Takes::kValue, "FILE", "step: the configuration; its data is not read"},
        {"--set", Option::Takes::kValue, "PATH=VALUE",
         "overrides a field that means something to WHAT (device, compute, parallel.layout, ...); "
         "repeatable"}}},
      Run,
      SpecFor};
}

}  // namespace annulus
