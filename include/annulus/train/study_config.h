#pragma once

// A scaling study as protobuf text (src/config/study.proto), read like a run's configuration: all errors at
// once, each with line, column, field, value and what was expected.
//
//   name: "cp"
//   run: "../run/llama-8b-8-layers.textproto"
//   measure { steps: 10 warm_up: 3 }
//   axes { ranks_per_host: [1, 2, 4]  cp: [1, 2, 4]  seq_len: [8192, 32768] }

#include <cstdint>
#include <string>
#include <vector>

#include "annulus/base/status.h"

namespace annulus {

enum class Scaling { kStrong, kWeak };  // the same work, or the same work for each rank

// One thing that is varied, beside the number of ranks.
struct StudyAxis {
  struct Value {
    std::string label;
    std::vector<std::string> overrides;  // of the base run
    friend bool operator==(const Value&, const Value&) = default;
  };
  std::string name;  // "cp", "optim.micro_batch"
  std::vector<Value> values;
  friend bool operator==(const StudyAxis&, const StudyAxis&) = default;
};

struct StudySpec {
  std::string name;
  std::string run;                     // absolute path
  std::vector<std::string> overrides;  // of every point
  std::string machine;                 // absolute path of a machine profile; empty: the base run's
  Scaling scaling = Scaling::kStrong;
  bool grow_sequences = false, grow_seq_len = false;  // with dp, with cp

  int64_t steps = 10, warm_up = 3, repeats = 1;
  double limit_minutes = 30;

  uint64_t seed = 0;
  double jitter = 0, straggler_share = 0, straggler_slowdown = 1;
  int64_t goodput_steps = 0;  // 0: the base run's

  std::vector<int64_t> hosts;  // empty: no axis, 1
  std::vector<int64_t> ranks_per_host;
  std::vector<StudyAxis> axes;
  friend bool operator==(const StudySpec&, const StudySpec&) = default;
};

// Overrides that make a run a short one which is only timed.
std::vector<std::string> MeasureOverrides(const StudySpec& spec);

struct ResolvedStudy {
  StudySpec spec;
  std::string text;  // as ResolvedConfig has it; its paths are absolute, so that it loads anywhere
};

// `path` is the file's: messages begin with it, and what it names is relative to its folder. `overrides`
// follow those of the study.
absl::StatusOr<ResolvedStudy> LoadStudy(const std::string& path, const std::string& text,
                                        const std::vector<std::string>& overrides = {});

}  // namespace annulus
