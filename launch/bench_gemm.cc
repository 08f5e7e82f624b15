// Dense products: the ceiling beside which the other benches stand.

#include "annulus/ops/linear.h"
#include "bench.h"

namespace annulus {

int64_t CeilingSize(DeviceKind device) { return device == DeviceKind::kCuda ? 8192 : 1024; }

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

namespace {

struct GemmOptions {
  int64_t m = 0, n = 0, k = 0;
};

absl::Status Run(Bench& bench, const GemmOptions& o) {
  const int64_t elements = o.m * o.k + o.n * o.k + o.m * o.n;
  ANNULUS_RETURN_IF_ERROR(bench.CheckMemory(elements * SizeOf(bench.dtype()), "lower --m, --n or --k"));
  const double tflop = 2e-12 * static_cast<double>(o.m) * static_cast<double>(o.n) * static_cast<double>(o.k);
  bench.Announce(absl::StrCat("a product of ", absl::SixDigits(tflop), " TFLOP on each rank"));
  ANNULUS_ASSIGN_OR_RETURN(const double rate, GemmRate(bench, o.m, o.n, o.k));
  bench.Report(
      {{"m", o.m}, {"n", o.n}, {"k", o.k}, {"tflops", rate}, {"datasheet_tflops", bench.gpu.bf16_tflops}});
  return absl::OkStatus();
}

absl::StatusOr<BenchRun> Plan(const Arguments& arguments, const RunSpec& spec) {
  GemmOptions o;
  ANNULUS_ASSIGN_OR_RETURN(o.m, arguments.PositiveInt("--m", CeilingSize(DeviceKindOf(spec.device))));
  ANNULUS_ASSIGN_OR_RETURN(o.n, arguments.PositiveInt("--n", o.m));
  ANNULUS_ASSIGN_OR_RETURN(o.k, arguments.PositiveInt("--k", o.m));
  ANNULUS_RETURN_IF_ERROR(CheckBenchTensor("--m, --k", {o.m, o.k}));
  ANNULUS_RETURN_IF_ERROR(CheckBenchTensor("--n, --k", {o.n, o.k}));
  ANNULUS_RETURN_IF_ERROR(CheckBenchTensor("--m, --n", {o.m, o.n}));
  return BenchRun([o](Bench& bench) { return Run(bench, o); });
}

}  // namespace

BenchKind GemmBench() {
  return {.name = "gemm", .options = {"--m", "--n", "--k"}, .fields = {"device", "compute"}, .plan = Plan};
}

}  // namespace annulus
