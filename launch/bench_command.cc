// `annulus bench`: rates of the parts and of the whole, beside their ceilings.

#include <algorithm>
#include <cstdio>

#include "annulus/ops/linear.h"
#include "annulus/train/measure.h"
#include "bench.h"
#include "collective.h"

namespace annulus {

absl::StatusOr<int64_t> Bench::Int(absl::string_view option, int64_t fallback) const {
  ANNULUS_ASSIGN_OR_RETURN(const std::optional<int64_t> value, arguments.PositiveInt(option));
  return value.value_or(fallback);
}

absl::StatusOr<double> Bench::Seconds(const std::function<absl::Status()>& fn) const {
  ANNULUS_ASSIGN_OR_RETURN(const int64_t repeats, Int("--repeats", 10));
  return SecondsOf(ctx(), machine.mesh.world, {.timed = repeats}, fn);
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

absl::StatusOr<TensorRef> Bench::Random(const Shape& shape, uint64_t seed) const {
  return RandomTensor(ctx(), ctx().saved, dtype(), shape, seed);
}

int64_t CeilingSize(const Bench& bench) { return bench.ctx().device.kind == DeviceKind::kCuda ? 8192 : 1024; }

absl::StatusOr<double> GemmRate(Bench& bench, int64_t m, int64_t n, int64_t k) {
  ArenaScope scope(bench.ctx().saved);
  ANNULUS_ASSIGN_OR_RETURN(const TensorRef a, bench.Random({m, k}, 1));
  ANNULUS_ASSIGN_OR_RETURN(const TensorRef b, bench.Random({n, k}, 2));
  const TensorRef c = bench.ctx().saved.Allocate(bench.dtype(), {m, n});
  ANNULUS_ASSIGN_OR_RETURN(const double seconds, bench.Seconds([&] {
    return LinearForward(bench.ctx(), a, b, Write::kOverwrite, c);
  }));
  return 2e-12 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k) / seconds;
}

absl::Status BenchGemm(Bench& bench) {
  ANNULUS_ASSIGN_OR_RETURN(const int64_t m, bench.Int("--m", CeilingSize(bench)));
  ANNULUS_ASSIGN_OR_RETURN(const int64_t n, bench.Int("--n", m));
  ANNULUS_ASSIGN_OR_RETURN(const int64_t k, bench.Int("--k", m));
  ANNULUS_ASSIGN_OR_RETURN(const double rate, GemmRate(bench, m, n, k));
  bench.Report({{"m", m}, {"n", n}, {"k", k}, {"tflops", rate}, {"datasheet_tflops", bench.gpu.bf16_tflops}});
  return absl::OkStatus();
}

namespace {

absl::Status RunOn(Communicator world, const Arguments& arguments) {
  const std::pair<const char*, absl::Status (*)(Bench&)> kinds[] = {{"gemm", BenchGemm},
                                                                    {"attention", BenchAttention},
                                                                    {"plans", BenchPlans},
                                                                    {"exchange", BenchExchange},
                                                                    {"step", BenchStep}};
  const auto kind = std::find_if(std::begin(kinds), std::end(kinds),
                                 [&](const auto& k) { return arguments.operand() == k.first; });
  if (kind == std::end(kinds)) {
    return world.AgreeOk(Invalid("annulus bench ", arguments.operand(),
                                 ": expected one of gemm, attention, plans, exchange, step"));
  }
  const absl::StatusOr<RunSpec> spec = SpecOf(arguments, world.size());
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(spec.status()));
  ANNULUS_ASSIGN_OR_RETURN(const Device device, PlaceRank(world, *spec));
  ANNULUS_ASSIGN_OR_RETURN(Machine machine, SetUpMachine(world, *spec, device));
  Bench bench{arguments, *spec, std::move(machine), {}};
  if (device.kind == DeviceKind::kCuda) {
    ANNULUS_ASSIGN_OR_RETURN(bench.gpu, DescribeGpu(device.index));
  }
  return kind->second(bench);
}

absl::Status Run(const Arguments& arguments, const std::string&) {
  return OnAllRanks([&](Communicator world) { return RunOn(std::move(world), arguments); });
}

}  // namespace

Command BenchCommand() {
  return {
      {"bench",
       "WHAT",
       "measures gemm, attention, plans, exchange or step, beside the ceiling of each",
       {{"--json", Option::Takes::kNothing, "", "one JSON object a result"},
        {"--repeats", Option::Takes::kValue, "N", "timed runs, of which the median counts (default 10)"},
        {"--m", Option::Takes::kValue, "M", "gemm: rows (default 8192, on CPUs 1024); --n, --k: default M"},
        {"--n", Option::Takes::kValue, "N", "gemm: columns"},
        {"--k", Option::Takes::kValue, "K", "gemm: inner size"},
        {"--heads", Option::Takes::kValue, "H", "attention, plans: query heads (default 16)"},
        {"--kv_heads", Option::Takes::kValue, "H", "attention: KV heads (default: heads)"},
        {"--dim", Option::Takes::kValue, "D", "attention: head dim (default 128)"},
        {"--v_dim", Option::Takes::kValue, "D", "attention: head dim of values (default: dim)"},
        {"--length", Option::Takes::kValue, "S", "attention: tokens over all ranks (default 32768)"},
        {"--window", Option::Takes::kValue, "W", "attention: keys a query sees (default: all before it)"},
        {"--mask", Option::Takes::kValue, "MASK", "attention: causal (default), full or documents"},
        {"--choice", Option::Takes::kValue, "NAME", "plans: only this one of those that it lists"},
        {"--profile", Option::Takes::kValue, "FILE", "plans: machine profile that they are predicted by"},
        {"--transport", Option::Takes::kValue, "T", "BEST, HOST, NCCL or COPY_ENGINE"},
        {"--throttle", Option::Takes::kValue, "GB/S", "artificial rate of each link"},
        {"--svg", Option::Takes::kValue, "FILE", "plans: draws the timelines of the fastest"},
        {"--bytes", Option::Takes::kValue, "B", "exchange: of a message (default: 1, 16 and 128 MiB)"},
        {"--config", Option::Takes::kValue, "FILE", "step: the configuration; its data is not read"},
        {"--set", Option::Takes::kValue, "PATH=VALUE",
         "overrides a field: device, compute, parallel.layout, parallel.exchange.transport; repeatable"}}},
      Run};
}

}  // namespace annulus
