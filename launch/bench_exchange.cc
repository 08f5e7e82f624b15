// The transport of the exchange, without attention: what a rank sends, all ranks sending at once, beside the
// nominal link and, by copy engines, plain copies. Links are as slow as the run throttles them, and then the
// output says so.

#include "annulus/comm/exchange_bench.h"
#include "bench.h"

namespace annulus {
namespace {

constexpr int64_t kMostBytes = int64_t{1} << 40;  // above any memory, far from overflow

// NVLink 4: 18 links of 25 GB/s a direction (NVIDIA H100 and H200 SXM datasheets).
double LinkCeiling(const GpuInfo& gpu) { return gpu.compute_major == 9 ? 450 : 0; }

// `asked`: bytes of a message; 0 for a choice of sizes.
absl::Status Run(Bench& bench, int64_t asked) {
  constexpr int64_t kMiB = int64_t{1} << 20;
  Communicator world = bench.machine.mesh.world;
  if (world.size() < 2) {
    return world.AgreeOk(
        Invalid("ranks=", world.size(), ": expected at least 2 (launch/mpirun -n 2 annulus bench exchange)"));
  }
  std::vector<int64_t> sizes = {kMiB, 4 * kMiB, 16 * kMiB, 64 * kMiB, 128 * kMiB};
  if (asked > 0) sizes = {asked};
  constexpr int64_t kBlocks = 5;  // of MeasureExchange: what is sent, and four buffers
  ANNULUS_RETURN_IF_ERROR(bench.CheckMemory(kBlocks * sizes.back(), "lower --bytes"));
  const int repeats = static_cast<int>(bench.repeats);
  const TransportKind kind = bench.transport();
  const LinkThrottle throttle = bench.machine.exchange.throttle;
  ANNULUS_ASSIGN_OR_RETURN(const std::unique_ptr<ExchangeTransport> transport,
                           MakeTransport(kind, bench.machine.mesh.cp, bench.ctx(), throttle));
  for (const int64_t bytes : sizes) {
    ANNULUS_ASSIGN_OR_RETURN(const ExchangeRate rate,
                             MeasureExchange(bench.ctx(), bench.machine.mesh.cp, *transport, bytes, repeats));
    nlohmann::ordered_json result = {{"bytes", bytes},
                                     {"transport", std::string(Name(kind))},
                                     {"one_way_gb_per_second", rate.one_way_gb_per_second},
                                     {"both_ways_gb_per_second", rate.both_ways_gb_per_second}};
    AddThrottle(throttle, &result);
    if (kind == TransportKind::kCopyEngine) {
      ANNULUS_ASSIGN_OR_RETURN(result["plain_copies_gb_per_second"],
                               MeasurePlainCopies(bench.ctx(), bench.machine.mesh.cp, bytes, repeats));
    }
    result["link_gb_per_second"] = LinkCeiling(bench.gpu);
    bench.Report(result);
  }
  return absl::OkStatus();
}

absl::StatusOr<BenchRun> Plan(const Arguments& arguments, const RunSpec&) {
  ANNULUS_ASSIGN_OR_RETURN(const int64_t asked, arguments.PositiveInt("--bytes", 0, kMostBytes));
  if (asked == 1) return Invalid("--bytes=1: expected at least 2, half for each neighbour");
  return BenchRun([asked](Bench& bench) { return Run(bench, asked); });
}

}  // namespace

BenchKind ExchangeBench() {
  return {.name = "exchange",
          .options = {"--bytes", "--transport", "--throttle"},
          .fields = {"device", "parallel.exchange"},
          .plan = Plan};
}

}  // namespace annulus
