#pragma once

// A study over a tiny run, as tests change it.

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "annulus/study/study_run.h"

namespace annulus {

inline constexpr char kStudyRun[] = R"(name: "tiny"
model {
  pattern: "(A -)^2"
  d_model: 16
  attention { heads: 2 kv_heads: 1 }
  mlp { d_ff: 24 }
}
data {
  train { text { path: "text.txt" } }
  seq_len: 24
}
parallel { dp: 2 }
optim {
  adamw { lr: 1e-2 }
  schedule { cosine { warmup_steps: 30 } }
  steps: 80
  tokens_per_step: 96
}
checkpoint { every_steps: 20 }
device: CPU
)";

// cp 1 and 2 on 2 and 4 ranks.
inline StudySpec TinyStudy() {
  StudySpec spec;
  spec.name = "study";
  spec.run = "c.textproto";
  spec.steps = 3;
  spec.warm_up = 1;
  spec.ranks_per_host = {2, 4};
  spec.axes = {{"cp", {{"1", {"parallel.cp=1"}}, {"2", {"parallel.cp=2"}}}}};
  return spec;
}

inline std::vector<PlannedPoint> Grid(const StudySpec& spec) {
  auto points = StudyGrid(spec, kStudyRun);
  EXPECT_TRUE(points.ok()) << points.status();
  return points.ok() ? *std::move(points) : std::vector<PlannedPoint>();
}

}  // namespace annulus
