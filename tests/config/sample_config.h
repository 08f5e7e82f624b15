#pragma once

// A configuration that tests change, and helpers to look at what loading it says.

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "absl/strings/str_replace.h"
#include "annulus/train/config.h"

namespace annulus {

inline constexpr char kSampleConfig[] = R"(name: "small"
model {
  pattern: "(A -)^2"
  d_model: 64
  attention { heads: 4 kv_heads: 2 }
  mlp { d_ff: 128 }
}
data {
  train { text { path: "a.txt" } }
  seq_len: 64
}
optim {
  adamw { lr: 1e-3 }
  steps: 100
  sequences_per_step: 8
}
)";

// The sample with `from`, which must be in it, replaced by `to`.
inline std::string Changed(const std::string& from, const std::string& to) {
  std::string text = kSampleConfig;
  EXPECT_EQ(absl::StrReplaceAll({{from, to}}, &text), 1) << from;
  return text;
}

inline absl::StatusOr<ResolvedConfig> Load(const std::string& text,
                                           const std::vector<std::string>& overrides = {},
                                           std::optional<int64_t> world = std::nullopt) {
  return LoadConfig("c.textproto", text, overrides, world);
}

// The lines of the InvalidArgument status, or "ok".
inline std::string ErrorsOf(const std::string& text, const std::vector<std::string>& overrides = {},
                            std::optional<int64_t> world = std::nullopt) {
  const absl::Status status = Load(text, overrides, world).status();
  if (status.ok()) return "ok";
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  return std::string(status.message());
}

}  // namespace annulus
