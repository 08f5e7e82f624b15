// What the trainer sends in a step is what the simulator says: models of every kind of layer on meshes of all
// three axes.

#include <gtest/gtest.h>

#include "absl/strings/str_split.h"
#include "annulus/study/simulate_step.h"
#include "trainer/trainer_testing.h"

namespace annulus::testing {
namespace {

// Of its second step: in the first nothing is gathered yet.
int64_t MeasuredBytes(const RunSpec& run, const MeshShape& shape) {
  const RunSpec spec = OnShape(run, shape);
  int64_t bytes = -1;
  OnLoopback(shape.world(), [&](Communicator world) {
    absl::StatusOr<ProcessMesh> mesh = ProcessMesh::Create(shape, world);
    ANNULUS_CHECK(mesh.ok()) << mesh.status();
    ANNULUS_CHECK_OK(mesh->CountTraffic("host"));
    const std::unique_ptr<DataSet> data = OpenData(spec);
    Context ctx{Device{}};
    Trainer trainer(spec, *mesh, ctx, ExchangeOptionsOf(spec, {TransportKind::kHost}, AssumedCpuCore()));
    ANNULUS_CHECK_OK(trainer.Initialize());
    for (int step = 0; step < 2; ++step) {
      const absl::StatusOr<Batch> batch =
          LoadBatch(*data, spec, trainer.layout(), step, mesh->at.dp, shape.dp, mesh->at.cp);
      ANNULUS_CHECK(batch.ok()) << batch.status();
      const absl::StatusOr<StepReport> report = trainer.Step(*batch, 0);
      ANNULUS_CHECK(report.ok()) << report.status();
      if (mesh->world.rank() == 0) bytes = report->sent->inside_hosts_bytes;
    }
  });
  return bytes;
}

int64_t PredictedBytes(const RunSpec& run, const MeshShape& shape) {
  const auto figures = PredictStep(OnShape(run, shape), AssumedCpuCore());
  ANNULUS_CHECK(figures.ok()) << figures.status();
  return figures->bytes_inside_hosts;
}

const std::vector<std::string>& Heads() {
  static const std::vector<std::string> overrides = {"model.d_model=16",
                                                     "model.attention.heads=4",
                                                     "model.attention.kv_heads=4",
                                                     "model.attention.head_dim=4",
                                                     "model.latent.heads=4",
                                                     "model.latent.kv_rank=8",
                                                     "model.latent.nope_dim=2",
                                                     "model.latent.rope_dim=2",
                                                     "model.latent.v_dim=2",
                                                     "data.seq_len=48",
                                                     "compute=F32"};
  return overrides;
}

class StepBytes : public ::testing::TestWithParam<const char*> {};

TEST_P(StepBytes, AreThoseThatTheTrainerSends) {
  const std::vector<std::string> words = absl::StrSplit(GetParam(), ';');
  std::vector<std::string> overrides = Heads();
  overrides.insert(overrides.end(), words.begin(), words.end());
  const RunSpec spec = SmallRun(overrides);
  for (const MeshShape& shape : {MeshShape{.tp = 2}, MeshShape{.tp = 4}, MeshShape{.cp = 2, .tp = 2},
                                 MeshShape{.dp = 2, .tp = 2}, MeshShape{.dp = 2, .cp = 2}}) {
    // What is not predicted: the sums of the loss and of the gradients' squares, a few numbers a rank.
    EXPECT_NEAR(static_cast<double>(PredictedBytes(spec, shape)),
                static_cast<double>(MeasuredBytes(spec, shape)), 256 * shape.world())
        << NameOf(shape);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Models, StepBytes,
    ::testing::Values(
        "model.pattern=A -", "model.pattern=T -", "model.pattern=T -;model.latent.q_rank=6",
        "model.pattern=T{g=2} -", "model.pattern=T{g=4} -;model.latent.q_rank=6",
        "model.pattern=T T -;recompute=BLOCK", "model.pattern=T{g=2} T -;recompute=NONE",
        "model.pattern=M L -;model.mamba.heads=4;model.mamba.head_dim=2;model.mamba.state=3;"
        "model.mamba.groups=4;model.lightning.heads=4;model.lightning.key_dim=2",
        "model.pattern=B G "
        "-;model.based.heads=4;model.based.key_dim=2;model.delta.heads=4;model.delta.key_dim=2"));

}  // namespace
}  // namespace annulus::testing
