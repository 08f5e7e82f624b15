#pragma once

// A small run for the tests of the trainer: its configuration, its text, and all its ranks as threads.

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "annulus/base/check.h"
#include "annulus/train/config.h"
#include "annulus/train/exchange.h"
#include "annulus/train/plan_exchange.h"
#include "annulus/train/trainer.h"
#include "support/loopback.h"

namespace annulus::testing {

inline constexpr char kSmallRun[] = R"(name: "small"
seed: 5
compute: F64
device: CPU
model {
  pattern: "A -"
  d_model: 8
  attention { heads: 2 kv_heads: 1 }
  mlp { d_ff: 12 }
}
data { train { text { path: "set by the test" } } validation_fraction: 0.2 seq_len: 11 }
optim { adamw { lr: 1e-2 } steps: 20 sequences_per_step: 12 micro_batch: 2 }
)";

// Words that differ everywhere, a line each; written once a process.
inline const std::string& TextPath() {
  static const std::string path = [] {
    const std::string name = absl::StrCat(::testing::TempDir(), "annulus-trainer-", getpid(), ".txt");
    std::ofstream file(name);
    for (int i = 0; i < 400; ++i) file << "word" << i * i << "\n";
    ANNULUS_CHECK(file.good()) << name;
    return name;
  }();
  return path;
}

class TextFileEnvironment : public ::testing::Environment {
 public:
  void TearDown() override { std::remove(TextPath().c_str()); }
};
inline const ::testing::Environment* const kTextFileEnvironment =
    ::testing::AddGlobalTestEnvironment(new TextFileEnvironment);

inline RunSpec SmallRun(const std::vector<std::string>& overrides = {}) {
  std::vector<std::string> all = {"data.train[0].text.path=" + TextPath()};
  all.insert(all.end(), overrides.begin(), overrides.end());
  absl::StatusOr<ResolvedConfig> config = LoadConfig("small.textproto", kSmallRun, all);
  ANNULUS_CHECK(config.ok()) << config.status();
  return config->spec;
}

inline std::unique_ptr<DataSet> OpenData(const RunSpec& spec) {
  absl::StatusOr<std::unique_ptr<DataSet>> data = DataSet::Open(spec.data, spec.seed, spec.model.vocab_size);
  ANNULUS_CHECK(data.ok()) << data.status();
  return *std::move(data);
}

// One rank of a run.
struct RankOfRun {
  ProcessMesh& mesh;
  const DataSet& data;
  Trainer& trainer;
};

inline RunSpec OnShape(RunSpec spec, const MeshShape& shape) {
  spec.parallel.dp = shape.dp, spec.parallel.cp = shape.cp, spec.parallel.tp = shape.tp;
  return spec;
}
inline std::string NameOf(const MeshShape& shape) {
  return absl::StrCat("dp ", shape.dp, " cp ", shape.cp, " tp ", shape.tp);
}

// fn on every rank of a mesh of threads.
inline void OnMesh(const RunSpec& run, const MeshShape& shape, const std::function<void(RankOfRun)>& fn) {
  const RunSpec spec = OnShape(run, shape);
  OnLoopback(shape.world(), [&](Communicator world) {
    absl::StatusOr<ProcessMesh> mesh = ProcessMesh::Create(shape, world);
    ANNULUS_CHECK(mesh.ok()) << mesh.status();
    const std::unique_ptr<DataSet> data = OpenData(spec);
    Context ctx{Device{}};
    Trainer trainer(spec, *mesh, ctx, ExchangeOptionsOf(spec, {TransportKind::kHost}, AssumedCpuCore()));
    ANNULUS_CHECK_OK(trainer.Initialize());
    fn({*mesh, *data, trainer});
  });
}

}  // namespace annulus::testing
