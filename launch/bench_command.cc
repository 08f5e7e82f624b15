// `annulus bench`: rates of the parts and of the whole, beside their ceilings.

#include <algorithm>
#include <cstdio>

#include "annulus/base/file.h"
#include "annulus/base/random.h"
#include "annulus/device/stream_timer.h"
#include "annulus/device/transfer.h"
#include "annulus/ops/elementwise.h"
#include "annulus/ops/linear.h"
#include "annulus/train/config.h"
#include "bench.h"

namespace annulus {

absl::StatusOr<int64_t> Bench::Int(absl::string_view option, int64_t fallback) const {
  ANNULUS_ASSIGN_OR_RETURN(const std::optional<int64_t> value, arguments.PositiveInt(option));
  return value.value_or(fallback);
}

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

absl::StatusOr<TensorRef> RandomTensor(Bench& bench, const Shape& shape, uint64_t seed) {
  // A block of a million values, repeated: drawing billions would take longer than what is measured.
  constexpr int64_t kBlock = int64_t{1} << 20;
  Context& ctx = bench.ctx();
  const TensorRef tensor = ctx.saved.Allocate(bench.dtype(), shape);
  const DType wide = AccumOf(bench.dtype());
  const TensorRef flat = tensor.Reshaped({shape.elements()});
  const Tensor host(Device{}, wide, {std::min(kBlock, shape.elements())});
  const RandomStream random(seed, "bench");
  VisitFloat(wide, [&]<class T>() {
    T* values = host.ref().data<T>();
    for (int64_t i = 0; i < host.ref().elements(); ++i) {
      values[i] = static_cast<T>(random.Normal(static_cast<uint64_t>(i)));
    }
  });
  ArenaScope scope(ctx.scratch);
  const TensorRef block = ctx.scratch.Allocate(wide, host.ref().shape());
  Upload(ctx, host.ref().raw(), host.ref().bytes(), block);
  for (int64_t begin = 0; begin < flat.elements(); begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, flat.elements());
    ANNULUS_RETURN_IF_ERROR(Cast(ctx, block.Rows(0, end - begin), flat.Rows(begin, end)));
  }
  return tensor;
}

int64_t CeilingSize(const Bench& bench) { return bench.ctx().device.kind == DeviceKind::kCuda ? 8192 : 1024; }

absl::StatusOr<double> GemmRate(Bench& bench, int64_t m, int64_t n, int64_t k) {
  ArenaScope scope(bench.ctx().saved);
  ANNULUS_ASSIGN_OR_RETURN(const TensorRef a, RandomTensor(bench, {m, k}, 1));
  ANNULUS_ASSIGN_OR_RETURN(const TensorRef b, RandomTensor(bench, {n, k}, 2));
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

absl::Status RunOn(Communicator world, const Arguments& arguments) {
  const std::pair<const char*, absl::Status (*)(Bench&)> kinds[] = {
      {"gemm", BenchGemm}, {"attention", BenchAttention}, {"exchange", BenchExchange}, {"step", BenchStep}};
  const auto kind = std::find_if(std::begin(kinds), std::end(kinds),
                                 [&](const auto& k) { return arguments.operand() == k.first; });
  if (kind == std::end(kinds)) {
    return world.AgreeOk(
        Invalid("annulus bench ", arguments.operand(), ": expected one of gemm, attention, exchange, step"));
  }
  const absl::StatusOr<RunSpec> spec = SpecFor(arguments, world.size());
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
        {"--window", Option::Takes::kValue, "W", "attention: keys a query sees (default: all before it)"},
        {"--bytes", Option::Takes::kValue, "B", "exchange: of a message (default: 1, 16 and 128 MiB)"},
        {"--config", Option::Takes::kValue, "FILE", "step: the configuration; its data is not read"},
        {"--set", Option::Takes::kValue, "PATH=VALUE",
         "overrides a field: device, compute, parallel.layout, parallel.exchange.transport; repeatable"}}},
      Run};
}

}  // namespace annulus
