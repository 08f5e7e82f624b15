#pragma once

// What the parts of `annulus bench` share: kinds of benches, set-up, timing, and one line or one JSON object
// a result.

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "annulus/device/gpu.h"
#include "annulus/train/measure.h"
#include "annulus/train/placement.h"
#include "commands.h"

namespace annulus {

// One run of an exchange.
struct ExchangeTime {
  double seconds = 0;         // of the slowest rank
  double waited_seconds = 0;  // for messages, of the rank that waited longest: part of its seconds
};

struct Bench {
  const Arguments& arguments;
  RunSpec spec;  // device, compute type, mesh and transport
  Machine machine;
  int64_t repeats;  // --repeats
  GpuInfo gpu;      // nothing on CPUs

  Context& ctx() const { return *machine.ctx; }
  // As the spec asks, or the best there is.
  TransportKind transport() const {
    return machine.exchange.transport.value_or(machine.exchange.available.front());
  }
  DType dtype() const { return DTypeOf(spec.compute); }
  // Says at once, on stderr, what is about to be measured: it may take long. On rank 0.
  void Announce(absl::string_view what) const;
  // Refuses to hold `bytes` on each rank if there is less memory. `cure`: options to lower. Collective.
  absl::Status CheckMemory(int64_t bytes, absl::string_view cure) const;
  // A tensor of normal random values in the compute type; memory of the context's `saved`.
  absl::StatusOr<TensorRef> Random(const Shape& shape, uint64_t seed) const;
  // Median over repeats of the slowest rank's seconds; after `fn` has run twice. Collective.
  absl::StatusOr<double> Seconds(const std::function<absl::Status()>& fn) const;
  // Of the run with the median seconds. `repeats.calls` means nothing to it. Collective.
  absl::StatusOr<ExchangeTime> MedianExchange(const Repeats& repeats,
                                              const std::function<absl::Status()>& fn) const;
  // Prints a result on rank 0, after what all results have in common. One of throttled links has been given
  // that by AddThrottle, and says so first.
  void Report(const nlohmann::ordered_json& result) const;
};

// That links were throttled to it, if they were.
void AddThrottle(LinkThrottle throttle, nlohmann::ordered_json* result);

// `value`, or an error that all ranks agree on. Collective.
template <typename T>
absl::StatusOr<T> Agreed(const Bench& bench, absl::StatusOr<T> value) {
  Communicator world = bench.machine.mesh.world;
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(value.status()));
  return value;
}

using BenchRun = std::function<absl::Status(Bench&)>;

// One operand of `annulus bench`. Whatever is wrong with its options is found before a device is touched:
// `plan` reads them all, and returns what is left to do on a machine that is set up.
struct BenchKind {
  const char* name;
  std::vector<absl::string_view> options;  // that mean something to it, besides those of every kind
  // What --set may give: these fields, and those inside of them. Empty: any.
  std::vector<absl::string_view> fields;
  // `spec` has its device and compute type resolved.
  absl::StatusOr<BenchRun> (*plan)(const Arguments& arguments, const RunSpec& spec);
};
BenchKind GemmBench();
BenchKind AttentionBench();
BenchKind PlansBench();
BenchKind AutoBench();
BenchKind LatentBench();
BenchKind TimelineBench();
BenchKind ExchangeBench();
BenchKind StepBench();

// Of an option that takes several values: "8,16".
std::vector<std::string> OptionList(const Arguments& arguments, absl::string_view option,
                                    absl::string_view fallback);
// --lengths, ascending; --throttles, 0 at full speed.
absl::StatusOr<std::vector<int64_t>> ReadLengths(const Arguments& arguments, absl::string_view fallback);
absl::StatusOr<std::vector<LinkThrottle>> ReadThrottles(const Arguments& arguments,
                                                        absl::string_view fallback);

// The names of options that mean something to the kind.
std::vector<absl::string_view> KnownOptions(const BenchKind& kind);
// Refuses options and fields that mean nothing to the kind, by name.
absl::Status CheckBenchOptions(const BenchKind& kind, const Arguments& arguments);

// Of --repeats and of lengths: what follows from them can be counted.
absl::StatusOr<int64_t> ReadRepeats(const Arguments& arguments);
constexpr int64_t kMostTokens = int64_t{1} << 31;  // squared, as pairs of tokens, below 2^63

// Refuses tensors whose bytes could not be counted; `what` says which, by its options.
absl::Status CheckBenchTensor(absl::string_view what, const std::vector<int64_t>& sizes);

// Rows and columns of a product large enough to fill the device.
int64_t CeilingSize(DeviceKind device);

// TFLOP/s of c[m, n] = a[m, k] b[n, k]^T. Collective.
absl::StatusOr<double> GemmRate(Bench& bench, int64_t m, int64_t n, int64_t k);

}  // namespace annulus
