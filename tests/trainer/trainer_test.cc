// The trainer on meshes of threads: validation is the same on every mesh, leaves training alone, and a step
// that is not finite changes no parameter.

#include "annulus/train/trainer.h"

#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>

#include "absl/strings/match.h"
#include "trainer/trainer_testing.h"

namespace annulus::testing {
namespace {

absl::StatusOr<StepReport> NextStep(const RankOfRun& rank, const RunSpec& spec) {
  const absl::StatusOr<Batch> batch = LoadBatch(rank.data, spec, rank.trainer.layout(), rank.trainer.step(),
                                                rank.mesh.at.dp, rank.mesh.shape.dp, rank.mesh.at.cp);
  ANNULUS_CHECK(batch.ok()) << batch.status();
  return rank.trainer.Step(*batch, 0);
}

// Losses of some steps, of rank 0.
std::vector<StepReport> StepsOn(const RunSpec& spec, const MeshShape& shape, int steps) {
  std::vector<StepReport> reports;
  OnMesh(spec, shape, [&](RankOfRun rank) {
    for (int i = 0; i < steps; ++i) {
      const absl::StatusOr<StepReport> report = NextStep(rank, spec);
      ANNULUS_CHECK(report.ok()) << report.status();
      if (rank.mesh.world.rank() == 0) reports.push_back(*report);
    }
  });
  return reports;
}

TEST(Exchange, EveryPlanTrainsAlike) {
  const RunSpec spec = SmallRun({"model.pattern=A - A{w=4}"});
  const std::vector<StepReport> want = StepsOn(spec, {}, 3);
  for (const char* plan :
       {"AUTO", "ALL_GATHER", "KV_RING", "BIDIRECTIONAL_KV_RING", "DIRECT_CAST", "TOKEN_RING",
        "BIDIRECTIONAL_TOKEN_RING", "BALANCED", "DOUBLE_RING", "MESH", "ULYSSES", "ARENA"}) {
    RunSpec planned = SmallRun(
        {"model.pattern=A - A{w=4}", "parallel.cp=4", absl::StrCat("parallel.exchange.plan=", plan)});
    const std::vector<StepReport> got = StepsOn(planned, {.cp = 4}, 3);
    for (size_t i = 0; i < want.size(); ++i) {
      EXPECT_NEAR(got[i].loss, want[i].loss, 1e-12 * want[i].loss) << plan << " step " << i + 1;
      EXPECT_NEAR(got[i].grad_norm, want[i].grad_norm, 1e-11 * want[i].grad_norm)
          << plan << " step " << i + 1;
    }
  }
}

TEST(Exchange, StepsReportAttentionPredictedAndMeasured) {
  const RunSpec spec =
      SmallRun({"model.pattern=A - A{w=4}", "parallel.cp=2", "parallel.exchange.plan=KV_RING",
                "parallel.exchange.backward.plan=ULYSSES"});
  for (const StepReport& report : StepsOn(spec, {.cp = 2}, 2)) {
    ASSERT_EQ(report.attention.size(), 4u);
    for (size_t i = 0; i < 4; ++i) {
      const AttentionReport& attention = report.attention[i];
      EXPECT_EQ(attention.layers.window, i < 2 ? 0 : 4);
      EXPECT_EQ(attention.pass, i % 2 == 0 ? Pass::kForward : Pass::kBackward);
      EXPECT_TRUE(absl::StartsWith(attention.plan, i % 2 == 0 ? "kv_ring" : "ulysses")) << attention.plan;
      EXPECT_EQ(attention.transport, TransportKind::kHost);
      EXPECT_GT(attention.predicted_ms, 0);
      EXPECT_GT(attention.measured_ms, 0);
      EXPECT_LT(attention.measured_ms, report.step_ms);
    }
  }
}

// Beside softmax attention with the same window; a layer of two branches takes the time of both.
TEST(Exchange, StepsReportWhatLatentAttentionExchanges) {
  for (const char* exchange : {"AUTO", "LATENT", "EXPANDED"}) {
    SCOPED_TRACE(exchange);
    const RunSpec spec =
        SmallRun({"model.pattern=A T - T{g=2}", "model.latent.heads=2", "model.latent.kv_rank=4",
                  "model.latent.nope_dim=2", "model.latent.rope_dim=2", "model.latent.v_dim=3",
                  absl::StrCat("parallel.exchange.latent=", exchange), "parallel.cp=2",
                  "parallel.exchange.plan=KV_RING"});
    for (const StepReport& report : StepsOn(spec, {.cp = 2}, 2)) {
      ASSERT_EQ(report.attention.size(), 6u);
      for (size_t i = 0; i < 6; ++i) {
        const AttentionReport& attention = report.attention[i];
        EXPECT_EQ(attention.layers.branch == BranchKind::kLatentAttention, i >= 2);
        EXPECT_EQ(attention.layers.latent_groups, i < 4 ? 1 : 2);
        EXPECT_TRUE(absl::StartsWith(attention.plan, "kv_ring")) << attention.plan;
        EXPECT_GT(attention.predicted_ms, 0);
        EXPECT_GT(attention.measured_ms, 0);
        if (i < 2) {
          EXPECT_EQ(attention.exchange, "");
          continue;
        }
        const bool may_latents = std::string(exchange) != "EXPANDED",
                   may_expanded = std::string(exchange) != "LATENT";
        EXPECT_TRUE((may_latents && attention.exchange == "latents") ||
                    (may_expanded && attention.exchange == "keys and values"))
            << attention.exchange;
        EXPECT_TRUE(absl::StrContains(attention.why, std::string(exchange) == "AUTO"
                                                         ? " elements a token"
                                                         : "as parallel.exchange.latent says"))
            << attention.why;
      }
    }
  }
}

TEST(Exchange, WaitingForItIsPartOfTheTimeOfAttention) {
  RunSpec spec = SmallRun({"parallel.cp=2", "parallel.exchange.plan=KV_RING"});
  spec.parallel.dp = 1;
  constexpr double kDelayUs = 3000;  // messages take longer than all computing: waiting is most of the time
  OnLoopback(2, [&](Communicator world) {
    ProcessMesh mesh = ProcessMesh::Create({1, 2, 1}, WithMessageDelay(world, kDelayUs)).value();
    const std::unique_ptr<DataSet> data = OpenData(spec);
    Context ctx{Device{}};
    Trainer trainer(spec, mesh, ctx, ExchangeOptionsOf(spec, {TransportKind::kHost}, AssumedCpuCore()));
    ANNULUS_CHECK_OK(trainer.Initialize());
    ANNULUS_CHECK_OK(trainer.Evaluate(*data).status());
    const absl::StatusOr<StepReport> report = NextStep({mesh, *data, trainer}, spec);
    ASSERT_TRUE(report.ok()) << report.status();
    double attention_ms = 0;
    for (const AttentionReport& each : report->attention) attention_ms += each.measured_ms;
    constexpr int kMicroBatches = 6;
    EXPECT_LE(report->exposed_exchange_ms, kMicroBatches * attention_ms);
    EXPECT_GT(report->exposed_exchange_ms, kMicroBatches * 2 * kDelayUs * 1e-3 / 2);
  });
}

// Runs that differ in what the model is made of, each with a mesh that splits it over tensor-parallel ranks.
struct SplitRun {
  const char* name;
  std::vector<std::string> overrides;
};
std::vector<SplitRun> SplitRuns() {
  const std::string documents = "data.document_mask=true";
  return {{"attention", {"model.pattern=A - A{w=4} -", documents}},
          {"tied_head", {"model.pattern=A -", "model.tied_head=true"}},
          {"untied_head", {"model.pattern=A -", "model.tied_head=false"}},
          {"meta_tokens", {"model.pattern=meta=3 A -"}},
          {"parallel", {"model.pattern=(A+-{combine=mean-norm})^2 A+-", documents}}};
}

// Losses, norms and so updates of tensor-parallel ranks are those of one rank; with micro-batches that add
// up, and with gradients that take turns in memory.
TEST(TensorParallel, TrainsAsOneRankDoes) {
  for (const SplitRun& run : SplitRuns()) {
    for (const char* micro_batch : {"optim.micro_batch=2", "optim.micro_batch=12"}) {
      std::vector<std::string> overrides = run.overrides;
      overrides.push_back(micro_batch);
      const RunSpec spec = SmallRun(overrides);
      const std::vector<StepReport> want = StepsOn(spec, {}, 4);
      EXPECT_LT(want.back().loss, want.front().loss);
      for (const MeshShape& shape :
           {MeshShape{.tp = 2}, {.dp = 2, .tp = 2}, {.cp = 2, .tp = 2}, {.dp = 2, .cp = 3, .tp = 2}}) {
        SCOPED_TRACE(absl::StrCat(run.name, ", ", micro_batch, ", ", NameOf(shape)));
        const std::vector<StepReport> got = StepsOn(spec, shape, 4);
        for (size_t i = 0; i < want.size(); ++i) {
          EXPECT_NEAR(got[i].loss, want[i].loss, 1e-11 * want[i].loss) << "step " << i + 1;
          EXPECT_NEAR(got[i].grad_norm, want[i].grad_norm, 1e-11 * want[i].grad_norm) << "step " << i + 1;
          EXPECT_EQ(got[i].tokens, want[i].tokens);
          EXPECT_GT(got[i].exposed_tensor_ms, 0);
        }
      }
    }
  }
}

// Of each micro-batch of a rank and each layer what both passes are said to send. The rows before a segment
// come from its neighbour and their gradients go back: of two ranks each sends one of the two, of three one
// sends both.
TEST(Trainer, ReportsWhatStateSpaceLayersSend) {
  for (const int cp : {1, 2, 3}) {
    const RunSpec spec = SmallRun({"model.pattern=(M -)^2 A", "parallel.layout=CONTIGUOUS",
                                   "model.mamba={heads: 2 head_dim: 4 state: 4 chunk: 4}"});
    const StateExchangeInputs inputs{
        .layout = LayoutOf(OnShape(spec, {.cp = cp})), .sequences = 2, .dtype = DType::kF64};
    int64_t want = 0;
    for (const StateOrder order : {StateOrder::kForward, StateOrder::kBackward}) {
      const StateExchange sent = StateExchangeOf(spec.model, BranchKind::kMamba, order, inputs);
      want += 6 * 2 * (sent.state_bytes + (cp == 2 && order == StateOrder::kBackward ? 0 : sent.halo_bytes));
    }
    EXPECT_EQ(want > 0, cp > 1);
    for (const StepReport& report : StepsOn(spec, {.cp = cp}, 2)) EXPECT_EQ(report.state_bytes, want) << cp;
  }
}

double EvaluateOn(const RunSpec& spec, const MeshShape& shape) {
  std::vector<double> losses(static_cast<size_t>(shape.world()));
  OnMesh(spec, shape, [&](RankOfRun rank) {
    const absl::StatusOr<Evaluation> got = rank.trainer.Evaluate(rank.data);
    ANNULUS_CHECK(got.ok()) << got.status();
    losses[static_cast<size_t>(rank.mesh.world.rank())] = got->loss;
  });
  for (double loss : losses) EXPECT_EQ(loss, losses[0]) << NameOf(shape);
  return losses[0];
}

TEST(Evaluate, IsTheSameOnEveryMesh) {
  for (const char* sequences : {"0", "7", "1"}) {  // all; dealt unevenly; fewer than data-parallel ranks
    const RunSpec spec = SmallRun({absl::StrCat("eval.sequences=", sequences)});
    const double want = EvaluateOn(spec, {});
    EXPECT_NEAR(want, std::log(256.0), 0.5) << "an untrained model knows nothing";
    for (const MeshShape& shape : {MeshShape{.cp = 2},
                                   {.cp = 3},
                                   {.dp = 2},
                                   {.dp = 2, .cp = 2},
                                   {.dp = 3},
                                   {.dp = 2, .cp = 3},
                                   {.tp = 2},
                                   {.dp = 2, .cp = 2, .tp = 2}}) {
      EXPECT_NEAR(EvaluateOn(spec, shape), want, 1e-13 * want) << NameOf(shape);
    }
  }
  EXPECT_NE(EvaluateOn(SmallRun({"eval.sequences=7"}), {}), EvaluateOn(SmallRun({"eval.sequences=8"}), {}));
}

TEST(Evaluate, LeavesTrainingAlone) {
  const RunSpec spec = SmallRun();
  const auto losses = [&](bool evaluate) {
    std::vector<double> losses;
    OnMesh(spec, {.dp = 2, .cp = 2}, [&](RankOfRun rank) {
      for (int i = 0; i < 4; ++i) {
        if (evaluate) ANNULUS_CHECK_OK(rank.trainer.Evaluate(rank.data).status());
        const absl::StatusOr<StepReport> report = NextStep(rank, spec);
        ANNULUS_CHECK(report.ok()) << report.status();
        if (rank.mesh.world.rank() == 0) losses.push_back(report->loss);
      }
    });
    return losses;
  };
  const std::vector<double> want = losses(false);
  EXPECT_EQ(losses(true), want);
  EXPECT_LT(want.back(), want.front());
}

// One micro-batch a step, whose gradients take turns in memory, and two, whose gradients do not: the same
// training.
TEST(Training, MemoryOfGradientsDoesNotShow) {
  const auto losses = [](const char* micro_batch) {
    const RunSpec spec = SmallRun({micro_batch, "model.pattern=(A -)^3"});
    std::vector<double> result;
    OnMesh(spec, {.dp = 2, .cp = 2}, [&](RankOfRun rank) {
      for (int step = 0; step < 4; ++step) {
        const absl::StatusOr<StepReport> report = NextStep(rank, spec);
        ANNULUS_CHECK(report.ok()) << report.status();
        if (rank.mesh.world.rank() == 0) result.push_back(report->loss);
      }
    });
    return result;
  };
  const std::vector<double> one = losses("optim.micro_batch=6"), two = losses("optim.micro_batch=3");
  for (size_t i = 0; i < one.size(); ++i) EXPECT_NEAR(one[i], two[i], 1e-12 * two[i]);
}

// What a step reports is what was planned, up to the padding of buckets; and gradients take turns only where
// that saves more than the share of their sums that each rank then keeps: not on one rank.
TEST(Training, HoldsWhatWasPlanned) {
  for (const MeshShape& shape : {MeshShape{}, {.dp = 2, .cp = 2}}) {
    const RunSpec spec = SmallRun({"optim.micro_batch=12", "model.pattern=(A -)^3"});
    const RunSpec shaped = OnShape(spec, shape);
    const auto passes = PlanExchange(shaped, ExampleBatchOf(shaped).sequences,
                                     ExchangeOptionsOf(shaped, {TransportKind::kHost}, AssumedCpuCore()));
    ASSERT_TRUE(passes.ok()) << passes.status();
    const MemoryPlan plan = PlanMemory(shaped, PlannedExchangesOf(*passes));
    OnMesh(spec, shape, [&, ranks = shape.world()](RankOfRun rank) {
      const absl::StatusOr<StepReport> report = NextStep(rank, spec);
      ANNULUS_CHECK(report.ok()) << report.status();
      const MemoryPlan& held = report->memory;
      const double padding = 8.0 * (ranks - 1) * rank.trainer.params().buckets();
      EXPECT_NEAR(static_cast<double>(held.parameters), static_cast<double>(plan.parameters), padding);
      EXPECT_NEAR(static_cast<double>(held.gradients), static_cast<double>(plan.gradients), padding);
      EXPECT_NEAR(static_cast<double>(held.optimizer), static_cast<double>(plan.optimizer), padding);
      EXPECT_GE(held.activations, plan.activations);
      EXPECT_GE(held.workspace, plan.workspace);
      EXPECT_GT(report->other_memory_bytes, 0);
      EXPECT_EQ(held.gradients < held.parameters, ranks > 1);
    });
  }
}

std::vector<double> ValuesOf(Trainer& trainer) {
  ANNULUS_CHECK_OK(trainer.WaitForParameters());
  const ParamStore& params = trainer.params();
  std::vector<double> values;
  for (int bucket = 0; bucket < params.buckets(); ++bucket) {
    const TensorRef all = params.BucketValues(bucket);
    values.insert(values.end(), all.data<double>(), all.data<double>() + all.elements());
  }
  return values;
}

// What a checkpoint says, by name.
std::map<std::string, std::vector<double>> TensorsOf(const Checkpoint& checkpoint) {
  std::map<std::string, std::vector<double>> tensors;
  for (const std::string& name : checkpoint.tensor_names()) {
    const ConstTensorRef tensor = checkpoint.Find(name).value();
    std::vector<double>& values = tensors[name];
    values.resize(static_cast<size_t>(tensor.elements()));
    std::memcpy(values.data(), tensor.raw(), values.size() * sizeof(double));
  }
  return tensors;
}

// Saved on tensor-parallel ranks, read on any other mesh and saved again: the same bits; and training goes on
// as if nothing had happened.
void ExpectMovesBetweenMeshesBitForBit(const RunSpec& spec) {
  const std::string root = absl::StrCat(::testing::TempDir(), "annulus-moved-", getpid());
  const auto save = [&](RankOfRun& rank, const std::string& name) {
    ANNULUS_CHECK_OK(rank.trainer.Save(absl::StrCat(root, "/", name), "", rank.data.fingerprint(), 1));
  };
  std::vector<double> straight(2);
  OnMesh(spec, {.cp = 2, .tp = 2}, [&](RankOfRun rank) {
    for (int i = 0; i < 2; ++i) ANNULUS_CHECK_OK(NextStep(rank, spec).status());
    save(rank, "first");
    for (size_t i = 0; i < 2; ++i) {
      const double loss = NextStep(rank, spec).value().loss;
      if (rank.mesh.world.rank() == 0) straight[i] = loss;
    }
  });
  const Checkpoint first = Checkpoint::Open(root + "/first").value();
  const auto want = TensorsOf(first);
  EXPECT_EQ(want.size(), 3 * BuildParamTable(spec.model).params.size());
  for (const MeshShape& shape :
       {MeshShape{}, {.tp = 4}, {.dp = 2}, {.cp = 3}, {.dp = 3, .tp = 2}, {.dp = 2, .cp = 2, .tp = 2}}) {
    SCOPED_TRACE(NameOf(shape));
    const std::string again = absl::StrCat("again-", shape.dp, "-", shape.cp, "-", shape.tp);
    OnMesh(spec, shape, [&](RankOfRun rank) {
      ANNULUS_CHECK_OK(rank.trainer.Restore(first, rank.data.fingerprint()));
      save(rank, again);
      for (size_t i = 0; i < 2; ++i) {
        EXPECT_NEAR(NextStep(rank, spec).value().loss, straight[i], 1e-11 * straight[i]);
      }
    });
    EXPECT_EQ(TensorsOf(Checkpoint::Open(absl::StrCat(root, "/", again)).value()), want);
  }
  std::filesystem::remove_all(root);
}

TEST(Checkpoints, MoveBetweenMeshesBitForBit) {
  ExpectMovesBetweenMeshesBitForBit(SmallRun({"model.pattern=meta=2 A - A+-{combine=mean-norm}",
                                              "model.attention.heads=4", "model.attention.head_dim=2"}));
}

TEST(Checkpoints, OfEveryKindOfLayerMoveBetweenMeshesBitForBit) {
  std::vector<std::string> overrides = {"model.pattern=M - T{g=2} L B G",
                                        "data.document_mask=true",
                                        "model.mamba.head_dim=2",
                                        "model.mamba.state=3",
                                        "model.mamba.groups=4",
                                        "model.latent.kv_rank=4",
                                        "model.latent.nope_dim=2",
                                        "model.latent.rope_dim=2",
                                        "model.latent.v_dim=2"};
  for (const char* kind : {"mamba", "latent", "lightning", "based", "delta"}) {
    overrides.push_back(absl::StrCat("model.", kind, ".heads=4"));
  }
  for (const char* kind : {"lightning", "based", "delta"}) {
    overrides.push_back(absl::StrCat("model.", kind, ".key_dim=2"));
  }
  ExpectMovesBetweenMeshesBitForBit(SmallRun(overrides));
}

TEST(NotFinite, SkippedStepLeavesParametersAndTheNextOneGoesOn) {
  const RunSpec spec = SmallRun({"nan_policy=SKIP"});
  OnMesh(spec, {.dp = 2, .cp = 2}, [&](RankOfRun rank) {
    ASSERT_TRUE(NextStep(rank, spec).ok());
    ASSERT_TRUE(rank.trainer.WaitForParameters().ok());
    double* weight =
        rank.trainer.params().Value(rank.trainer.params().table().IndexOf("embed.weight")).data<double>();
    const double before = weight['w' * spec.model.d_model];
    weight['w' * spec.model.d_model] = std::numeric_limits<double>::quiet_NaN();
    const std::vector<double> poisoned = ValuesOf(rank.trainer);
    const absl::StatusOr<StepReport> skipped = NextStep(rank, spec);
    ASSERT_TRUE(skipped.ok()) << skipped.status();
    EXPECT_TRUE(skipped->skipped);
    EXPECT_TRUE(std::isnan(skipped->loss));
    EXPECT_EQ(skipped->step, 2);
    EXPECT_EQ(rank.trainer.step(), 2);
    const std::vector<double> after = ValuesOf(rank.trainer);
    EXPECT_EQ(std::memcmp(after.data(), poisoned.data(), after.size() * sizeof(double)), 0);

    weight['w' * spec.model.d_model] = before;
    const absl::StatusOr<StepReport> next = NextStep(rank, spec);
    ASSERT_TRUE(next.ok()) << next.status();
    EXPECT_FALSE(next->skipped);
    EXPECT_TRUE(std::isfinite(next->loss));
    EXPECT_NE(ValuesOf(rank.trainer), after);
  });
}

TEST(NotFinite, StopsOnAllRanksAlikeEvenIfOneRankMeetsIt) {
  const RunSpec spec = SmallRun();
  OnMesh(spec, {.dp = 2}, [&](RankOfRun rank) {
    if (rank.mesh.world.rank() == 1) {
      const int norm = rank.trainer.params().table().IndexOf("final_norm.weight");
      *rank.trainer.params().Value(norm).data<double>() = std::numeric_limits<double>::infinity();
    }
    const absl::Status status = NextStep(rank, spec).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), "step 1: loss=")) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), "nan_policy: STOP")) << status;
    EXPECT_EQ(rank.trainer.step(), 0);
  });
}

}  // namespace
}  // namespace annulus::testing
