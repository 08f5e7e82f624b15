#pragma once

// What the parts of `annulus bench` share: set-up, timing, and one line or one JSON object a result.

#include <functional>
#include <nlohmann/json.hpp>
#include <string>

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
  absl::StatusOr<int64_t> Int(absl::string_view option, int64_t fallback) const;
  // Median over repeats of the slowest rank's seconds; after `fn` has run twice. Collective.
  absl::StatusOr<double> Seconds(const std::function<absl::Status()>& fn) const;
  // Prints a result on rank 0, after what all results have in common.
  void Report(const nlohmann::ordered_json& result) const;
};

// A tensor of normal random values in the compute type; memory of the caller's arena.
absl::StatusOr<TensorRef> RandomTensor(Bench& bench, const Shape& shape, uint64_t seed);

// A product large enough to fill the device.
int64_t CeilingSize(const Bench& bench);

// TFLOP/s of c[m, n] = a[m, k] b[n, k]^T. Collective.
absl::StatusOr<double> GemmRate(Bench& bench, int64_t m, int64_t n, int64_t k);

absl::Status BenchGemm(Bench& bench);
absl::Status BenchAttention(Bench& bench);
absl::Status BenchExchange(Bench& bench);
absl::Status BenchStep(Bench& bench);

}  // namespace annulus
