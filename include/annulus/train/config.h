#pragma once

// The configuration of a run: protobuf text of the schema in src/config/annulus.proto, checked as a whole.
//
//   name: "tiny"
//   model { pattern: "(A -)^2"  d_model: 64  attention { heads: 4 kv_heads: 2 }  mlp { d_ff: 128 } }
//   data { train { text { path: "text.txt" } }  seq_len: 64  validation_fraction: 0.1 }
//   optim { adamw { lr: 3e-3 }  steps: 100  sequences_per_step: 8 }
//
// All errors come in one InvalidArgument status, one line each:
//
//   tiny.textproto:4:17: optim.adamw.lr=-1: expected a number in (0, 1e+09]
//   tiny.textproto:4:9: optim.adamw.lrr: no such field; did you mean `lr`?
//   --set parallel.layout=ZIGZG: expected one of CONTIGUOUS, ZIGZAG, STRIPED (did you mean `ZIGZAG`?)

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "annulus/base/status.h"
#include "annulus/train/spec.h"

namespace annulus {

struct ResolvedConfig {
  RunSpec spec;
  // Every value with its source as a comment: "file:line", "--set", "default" or "derived: how". Loading it
  // gives the same spec.
  std::string text;
};

// `name` stands for the file in messages. Each override reads "path=value", as in
// "data.train[0].text.path=a.txt"; later ones win. With `world`, the number of ranks is checked too and
// parallel.dp, where left away, becomes world / (cp * tp); without it, parallel.dp then stays 0.
absl::StatusOr<ResolvedConfig> LoadConfig(const std::string& name, const std::string& text,
                                          const std::vector<std::string>& overrides,
                                          std::optional<int64_t> world = std::nullopt);

// Version of the protobuf library that reads configurations.
std::string ProtobufVersion();

// Whether the run fits `world` ranks; parallel.dp = 0 stands for world / (cp * tp). One line a finding.
absl::Status ValidateForWorld(const RunSpec& spec, int64_t world);

}  // namespace annulus
