#pragma once

// The files of a run directory, read for its report.

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "annulus/base/status.h"
#include "annulus/train/spec.h"
#include "svg_chart.h"

namespace annulus {

// The numbers of a step, by their place in RunNumbers().
enum RunNumber {
  kLoss,
  kGradNorm,
  kLearningRate,
  kTokens,
  kStepMs,
  kTokensPerSecond,
  kTflopsCausal,
  kTflopsFull,
  kMfuCausal,
  kMfuFull,
  kExchangeMs,
  kReduceMs,
  kTensorMs,
  kDataMs,
  kStateBytes,
  kThrottle,
  kMemoryPeak,
  kMemoryParameters,
  kMemoryGradients,
  kMemoryOptimizer,
  kMemoryActivations,
  kMemoryWorkspace,
  kMemoryExchange,
  kMemoryOther,
  kSkipped,
  kValLoss,
  kValAccuracy,
  kRunNumbers
};
struct RunNumberInfo {
  const char* json;  // where in a line of metrics.jsonl, as a JSON pointer
  const char* csv;   // column, with the unit
};
const std::array<RunNumberInfo, kRunNumbers>& RunNumbers();

// Attention of one kind of layers in one pass: milliseconds of a layer and micro-batch.
struct AttentionTimes {
  std::string name;                             // "attention, window 1024, forward"
  std::string plan;                             // of the last step
  std::vector<ChartPoint> measured, predicted;  // over steps
};

struct RunStep {
  int64_t step = 0;
  std::array<std::optional<double>, kRunNumbers> numbers = {};  // NaN and inf are numbers here
  double Get(RunNumber number) const { return numbers[number].value_or(kNotANumber); }
};

struct RunEvent {
  std::string time, event, detail;
  int64_t step = 0;
};

struct RunRecord {
  std::string name;            // of the directory
  std::vector<RunStep> steps;  // ascending
  std::vector<AttentionTimes> attention;
  std::vector<RunEvent> events;
  std::string config, command, env;  // texts; empty: not there
  std::string devices;               // "4 x NVIDIA H200"; empty: env does not say
  std::optional<RunSpec> spec;       // of config, if this program still reads it
};

absl::StatusOr<RunRecord> ReadRun(const std::string& run_dir);

}  // namespace annulus
