#pragma once

// What the parts of `annulus bench` share: kinds of benches, set-up, timing, and one line or one JSON object
// a result.

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "annulus/device/gpu.h"
#include "annulus/train/placement.h"
#include "commands.h"

namespace annulus {

struct Bench {
  const Arguments& arguments;
  RunSpec spec;  // device, compute type, mesh and transport
  Machine machine;
  GpuInfo gpu;  // nothing on CPUs

  Context& ctx() const { return *machine.ctx; }
  DType dtype() const { return DTypeOf(spec.compute); }
  // An option as an integer of at least 1.
  absl::StatusOr<int64_t> Int(absl::string_view option, int64_t fallback) const {
    return arguments.PositiveInt(option, fallback);
  }
  // Median over repeats of the slowest rank's seconds; after `fn` has run twice. Collective.
  absl::StatusOr<double> Seconds(const std::function<absl::Status()>& fn) const;
  // Prints a result on rank 0, after what all results have in common.
  void Report(const nlohmann::ordered_json& result) const;
};

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
BenchKind StepBench();

// Refuses options and fields that mean nothing to the kind, by name.
absl::Status CheckBenchOptions(const BenchKind& kind, const Arguments& arguments);

// Refuses tensors whose bytes could not be counted; `what` says which, by its options.
absl::Status CheckBenchTensor(absl::string_view what, const std::vector<int64_t>& sizes);

// A tensor of normal random values in the compute type; memory of the caller's arena.
absl::StatusOr<TensorRef> RandomTensor(Bench& bench, const Shape& shape, uint64_t seed);

// Rows and columns of a product large enough to fill the device.
int64_t CeilingSize(DeviceKind device);

// TFLOP/s of c[m, n] = a[m, k] b[n, k]^T. Collective.
absl::StatusOr<double> GemmRate(Bench& bench, int64_t m, int64_t n, int64_t k);

absl::Status BenchExchange(Bench& bench);

}  // namespace annulus
