#pragma once

// What a run prints and writes while it trains.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "annulus/train/trainer.h"

namespace annulus {

std::string FormatDuration(double seconds);                    // "46m", "2h 5m", "8s"
std::string FormatCount(double value);                         // "88.4k", "1.2M"
std::string CountText(int64_t count, absl::string_view what);  // "1 rank", "2 ranks"
std::string MeshText(int64_t dp, int64_t cp, int64_t tp);      // "dp 8 x cp 4 x tp 2"
std::string FormatBytes(double bytes);                         // "71.2 GiB"
// "parameters 5.2 GiB, gradients 3.9 GiB, ...", without parts that are empty.
std::string MemoryText(const MemoryPlan& memory);

// "step 120/2000 6% | loss 2.913 | gnorm 0.71 | 1,482 ms | 88.4k tok/s (11.05k/rank) | ... | ETA 46m"
std::string StepLine(const StepReport& report, int64_t total_steps, int ranks, double eta_seconds);

// "validation loss 1.2345 nats per token, accuracy 0.9876"
std::string EvaluationText(const Evaluation& evaluation);

// One line of metrics.jsonl. Numbers that are not finite are written as strings ("nan", "inf").
std::string MetricsJson(const StepReport& report, const std::optional<Evaluation>& evaluation);

// The plan of each pass of attention, and why: "attention (all keys) forward: ..."
std::vector<std::string> PlanLines(const StepReport& report);

// Predicted against measured time of attention over a run. The first step, in which plans are made, is left
// out.
class AttentionSummary {
 public:
  void Add(const StepReport& report);
  std::vector<std::string> Lines() const;  // one for each window and pass; none without a second step

 private:
  bool first_ = true;
  std::string throttle_;  // in words; empty without
  std::vector<AttentionReport> last_;
  std::vector<std::vector<double>> measured_ms_;  // by entry of last_
};

// Console of rank 0. On a terminal the newest step line is redrawn in place behind a bar; elsewhere step
// lines are printed at most every `seconds` seconds, and always the first and the last. Other ranks print
// nothing.
class Console {
 public:
  enum class Output { kPrint, kSilent };
  explicit Console(Output output);
  ~Console();

  void Line(const std::string& text);  // a line that stays
  void Progress(const StepReport& report, int64_t total_steps, const std::string& line);

 private:
  Output output_;
  int columns_;  // 0: not a terminal
  bool open_line_ = false;
  double last_seconds_ = -1e9;
};

}  // namespace annulus
