#pragma once

// A model that trains in seconds, and what a run of it leaves behind.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "annulus/base/random.h"
#include "annulus/train/checkpoint.h"
#include "system/job.h"

namespace annulus::testing {

// 25 positions divide by none of 2, 3 and 4: every split of a sequence has padding.
inline constexpr char kTinyConfig[] = R"(name: "tiny"
seed: 7
model {
  pattern: "(A -)^2"
  d_model: 16
  attention { heads: 2 kv_heads: 1 }
  mlp { d_ff: 24 }
}
data {
  train { text { path: "text.txt" } }
  validation_fraction: 0.1
  seq_len: 25
}
parallel { layout: ZIGZAG }
optim {
  adamw { lr: 1e-2 }
  schedule { cosine { warmup_steps: 3 } }
  steps: 8
  sequences_per_step: 4
  micro_batch: 2
}
eval { every_steps: 4 sequences: 5 }
device: CPU
)";

// Words of two to five letters drawn from a small alphabet: a text with something to learn.
inline std::string TinyText() {
  const RandomStream random(1, "text");
  std::string text;
  for (uint64_t i = 0; text.size() < 6000; ++i) {
    const uint64_t word = random.Below(i, 40);
    for (uint64_t letter = 0; letter < 2 + word % 4; ++letter) {
      text += static_cast<char>('a' + random.Below(1000 * word + letter, 12));
    }
    text += i % 9 == 8 ? '\n' : ' ';
  }
  return text;
}

// The inputs of a run, as c.textproto and text.txt.
inline void WriteTinyInputs(const std::string& folder) {
  Overwrite(folder + "/c.textproto", kTinyConfig);
  Overwrite(folder + "/text.txt", TinyText());
}

// "annulus train c.textproto --run_dir RUN --set ..." on `ranks` ranks, in `folder`.
inline JobSpec TrainJob(const std::string& folder, int ranks, const std::string& run,
                        const std::vector<std::string>& overrides,
                        const std::vector<std::string>& options = {}) {
  JobSpec spec{.folder = folder, .ranks = ranks, .arguments = {"train", "c.textproto", "--run_dir", run}};
  for (const std::string& value : overrides) spec.arguments.insert(spec.arguments.end(), {"--set", value});
  spec.arguments.insert(spec.arguments.end(), options.begin(), options.end());
  return spec;
}

inline void ExpectDone(const JobResult& result) {
  EXPECT_TRUE(result.in_time && result.exit_code == 0) << result;
  EXPECT_EQ(ErrorLines(result).size(), 0u) << result;
}

// Lines of metrics.jsonl that are whole.
inline std::vector<nlohmann::json> ReadMetrics(const std::string& run) {
  std::vector<nlohmann::json> lines;
  const std::string text = Contents(run + "/metrics.jsonl");
  for (size_t begin = 0, end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1) {
    lines.push_back(
        nlohmann::json::parse(text.substr(begin, end - begin), nullptr, /*allow_exceptions=*/false));
  }
  return lines;
}

// The step of the last whole line of metrics.jsonl; 0 if there is none.
inline int64_t LastStep(const std::string& run) {
  const std::vector<nlohmann::json> lines = ReadMetrics(run);
  return lines.empty() || !lines.back().is_object() ? 0 : lines.back().value("step", int64_t{0});
}

// Exactly one object for each of the steps 1..steps, in order, with every key; val_loss every `eval_every`
// steps and at the end.
inline void ExpectWholeMetrics(const std::string& run, int64_t steps, int64_t eval_every) {
  const char* keys[] = {"step",
                        "loss",
                        "grad_norm",
                        "lr",
                        "tokens",
                        "step_ms",
                        "tokens_per_second",
                        "tflops_causal",
                        "tflops_full",
                        "exposed_exchange_ms",
                        "memory_peak_bytes"};
  const std::string text = Contents(run + "/metrics.jsonl");
  ASSERT_TRUE(!text.empty() && text.back() == '\n') << run;
  const std::vector<nlohmann::json> lines = ReadMetrics(run);
  ASSERT_EQ(lines.size(), static_cast<size_t>(steps)) << run;
  for (int64_t step = 1; step <= steps; ++step) {
    const nlohmann::json& line = lines[static_cast<size_t>(step - 1)];
    ASSERT_TRUE(line.is_object()) << run << " line " << step;
    for (const char* key : keys)
      ASSERT_TRUE(line.contains(key) && line[key].is_number()) << line << " " << key;
    EXPECT_EQ(line["step"], step);
    EXPECT_EQ(line.contains("val_loss"), step % eval_every == 0 || step == steps) << line;
  }
}

// "" if what was learned is the same at every step: loss, gradient norm, learning rate, tokens and validation
// loss, within a relative tolerance, 0 meaning bit for bit.
inline std::string MetricsDifference(const std::string& run, const std::string& reference, double tolerance) {
  const std::vector<nlohmann::json> got = ReadMetrics(run), want = ReadMetrics(reference);
  if (got.size() != want.size()) return absl::StrCat(got.size(), " steps, expected ", want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    for (const char* key : {"loss", "grad_norm", "lr", "tokens", "val_loss"}) {
      if (got[i].contains(key) != want[i].contains(key)) return absl::StrCat("step ", i + 1, ": ", key);
      if (!got[i].contains(key)) continue;
      const double a = got[i][key].get<double>(), b = want[i][key].get<double>();
      if (!(std::abs(a - b) <= tolerance * std::abs(b))) {
        return absl::StrCat("step ", i + 1, ": ", key, " ", got[i][key].dump(), ", expected ",
                            want[i][key].dump());
      }
    }
  }
  return "";
}

// "" if both newest checkpoints hold the same tensors, bit for bit.
inline std::string CheckpointDifference(const std::string& run, const std::string& reference) {
  const absl::StatusOr<Checkpoint> got = Checkpoint::Open(run + "/ckpt"),
                                   want = Checkpoint::Open(reference + "/ckpt");
  if (!got.ok()) return got.status().ToString();
  if (!want.ok()) return want.status().ToString();
  if (got->meta().step != want->meta().step) return absl::StrCat("step ", got->meta().step);
  if (got->tensor_names() != want->tensor_names()) return "names of tensors";
  for (const std::string& name : got->tensor_names()) {
    const ConstTensorRef a = got->Find(name).value(), b = want->Find(name).value();
    if (a.dtype() != b.dtype() || !(a.shape() == b.shape())) return name + ": type";
    if (std::memcmp(a.raw(), b.raw(), static_cast<size_t>(b.bytes())) != 0) return name + ": data";
  }
  return got->tensor_names().empty() ? "no tensors" : "";
}

// What a run must not lose: every file but logs and events, by relative path.
inline std::map<std::string, std::string> Snapshot(const std::string& run) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(run)) {
    const std::string name = entry.path().lexically_relative(run).string();
    if (!entry.is_regular_file() || absl::StartsWith(name, "logs/")) continue;
    if (name == "events.jsonl" || name == "lock") continue;
    files[name] = Contents(entry.path().string());
  }
  return files;
}

inline std::vector<std::string> Names(const std::string& folder) { return ListDirectory(folder).value(); }

}  // namespace annulus::testing
