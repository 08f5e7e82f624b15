// Whole training jobs on GPUs, as a user starts them: the same training as on CPUs, and a known end whatever
// happens to a rank. Ranks have a GPU each, or share.

#include <cuda_runtime_api.h>

#include <regex>

#include "gpu_system/train_run.h"

namespace annulus::testing {
namespace {

// 150 positions give every rank of two padding. %s: the shipped text.
constexpr char kConfig[] = R"(name: "gpu"
seed: 5
device: CUDA
compute: BF16
step_deadline_seconds: 60
model {
  pattern: "A - A{w=64} -"
  d_model: 128
  attention { heads: 2 kv_heads: 1 head_dim: 64 }
  mlp { d_ff: 344 }
}
data {
  train { text { path: "%s" } }
  validation_fraction: 0.05
  seq_len: 150
}
optim {
  adamw { lr: 1e-3 }
  schedule { constant { warmup_steps: 10 } }
  steps: 50
  sequences_per_step: 8
  micro_batch: 2
}
eval { every_steps: 25 sequences: 16 }
)";

using Mesh = TrainMesh;
constexpr Mesh kMeshes[] = {{1, 1}, {1, 2}, {2, 2}};

double SecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

bool Finds(const std::string& text, const std::string& regex) {
  return std::regex_search(text, std::regex(regex));
}

// Takes memory of a GPU until `leave_bytes` and less than 1 MiB more are free.
class MemoryFiller {
 public:
  MemoryFiller(int gpu, int64_t leave_bytes) {
    ANNULUS_CHECK_OK(UseGpu(gpu));
    for (int64_t chunk = Free(); chunk >= 1 << 20; chunk /= 2) {
      void* data = nullptr;
      while (Free() - leave_bytes >= chunk && cudaMalloc(&data, static_cast<size_t>(chunk)) == cudaSuccess) {
        taken_.push_back(data);
      }
      cudaGetLastError();
    }
  }
  ~MemoryFiller() {
    for (void* data : taken_) EXPECT_EQ(cudaFree(data), cudaSuccess);
  }
  MemoryFiller(const MemoryFiller&) = delete;
  MemoryFiller& operator=(const MemoryFiller&) = delete;

 private:
  static int64_t Free() { return MemoryOfGpu().value().free_bytes; }
  std::vector<void*> taken_;
};

class TrainOnGpu : public GpuTraining {
 protected:
  TrainOnGpu() : GpuTraining(kConfig) {}
  // The newest checkpoint, which must be whole; its step.
  int64_t SavedStep(const std::string& run) const {
    const absl::StatusOr<Checkpoint> saved = Checkpoint::Open(Path(run) + "/ckpt");
    EXPECT_TRUE(saved.ok()) << saved.status();
    return saved.ok() ? saved->meta().step : -1;
  }
  // Until the job has done 30 steps.
  void AwaitStep30(Job& job) const {
    ASSERT_TRUE(job.WaitWhileRunning([this] { return LastStep(Path("run")) >= 30; }, kSecondsToTrain))
        << job.Wait(0);
  }
  // The interrupted run has a whole checkpoint, and goes on from it.
  void ExpectGoesOn(const Mesh& mesh) const {
    const int64_t saved = SavedStep("run"), end = saved + 5;
    EXPECT_GE(saved, 20);
    Train(mesh, "run", {absl::StrCat("optim.steps=", end)}, {"--resume"});
    EXPECT_EQ(LastStep(Path("run")), end);
  }

  // Saves every 20 steps and does not end by itself.
  const Strings endless_ = {"optim.steps=10000000", "checkpoint.every_steps=20"};
};

// ---- The same training as on CPUs.

// How far losses may be from those of the run in f32 on the CPU. AdamW divides a gradient by its own size, so
// rounding grows from step to step. With this configuration f32 on the CPU is within 4e-8 of f64 for 20 steps
// and within 3e-6 for 50: 30 times that. A model in f64 that is rounded to bf16 wherever a GPU stores bf16
// (the naive decoder of model_rounded.h, with masters in f64) is within 4.5e-4 for 20 steps and within 5e-3
// for 50: 4 times that.
struct Bounds {
  const char* compute;
  double in_20_steps, in_50_steps;
};
constexpr Bounds kF32 = {"compute=F32", 1e-6, 1e-4}, kBf16 = {"compute=BF16", 2e-3, 2e-2};

TEST_F(TrainOnGpu, LossFollowsTheCpu) {
  Train({1, 1}, "cpu", {"device=CPU", "compute=F32"});
  const std::string cpu = Path("cpu");
  const std::vector<nlohmann::json> losses = ReadMetrics(cpu);
  ASSERT_EQ(losses.size(), 50u);
  EXPECT_LT(losses.back()["loss"].get<double>(), 0.6 * losses.front()["loss"].get<double>());
  for (const Bounds& bounds : {kF32, kBf16}) {
    for (const Mesh& mesh : kMeshes) {
      const std::string run = absl::StrCat(bounds.compute, " ", mesh.Name());
      SCOPED_TRACE(run);
      Train(mesh, run, {bounds.compute});
      ExpectWholeMetrics(Path(run), 50, 25);
      const double early = LossDifference(Path(run), cpu, 20), all = LossDifference(Path(run), cpu, 50);
      std::cout << run << ": losses within " << early << " of the CPU's in 20 steps, " << all << " in 50\n";
      EXPECT_LE(early, bounds.in_20_steps);
      EXPECT_LE(all, bounds.in_50_steps);
      if (bounds.in_20_steps > kF32.in_20_steps) {
        EXPECT_GT(early, kF32.in_20_steps) << "bf16 is not what ran";
      }
    }
  }
}

// One micro-batch a step lets the gradients of layers take turns in memory: each is on its way to its owners
// before another is written where it was. Everything elementwise runs again in the backward pass. With these
// eight layers f32 on the CPU is within 1.4e-7 of f64: 30 times that.
TEST_F(TrainOnGpu, LossFollowsTheCpuWhileGradientsTakeTurns) {
  const Strings layers = {"compute=F32", "model.pattern=(A -)^4", "optim.steps=20", "eval.every_steps=10"};
  Train({1, 1}, "cpu", Joined({"device=CPU"}, layers));
  for (const Mesh& mesh : kMeshes) {
    const std::string run = mesh.Name();
    SCOPED_TRACE(run);
    Train(mesh, run,
          Joined({absl::StrCat("optim.micro_batch=", 8 / mesh.dp), "recompute=ELEMENTWISE"}, layers));
    ExpectWholeMetrics(Path(run), 20, 10);
    const double all = LossDifference(Path(run), Path("cpu"), 20);
    std::cout << run << ": losses within " << all << " of the CPU's in 20 steps\n";
    EXPECT_LE(all, 4e-6);
  }
}

TEST_F(TrainOnGpu, DeterministicRunsAreEqualBitForBit) {
  const std::pair<const char*, Mesh> cases[] = {
      {"compute=BF16", {1, 1}}, {"compute=BF16", {2, 2}}, {"compute=F32", {1, 2}}};
  for (const auto& [compute, mesh] : cases) {
    SCOPED_TRACE(absl::StrCat(compute, " ", mesh.Name()));
    Strings runs;
    for (const char* which : {"first ", "second "}) {
      runs.push_back(absl::StrCat(which, compute, mesh.ranks()));
      Train(mesh, runs.back(), {compute, "deterministic=true", "optim.steps=20"});
    }
    ExpectSameRun(runs[0], runs[1]);
    const std::map<std::string, std::string> first = Snapshot(Path(runs[0]) + "/ckpt"),
                                             second = Snapshot(Path(runs[1]) + "/ckpt");
    EXPECT_EQ(first.size(), second.size());
    int shards = 0;
    for (const auto& [name, bytes] : first) {
      if (!absl::EndsWith(name, ".safetensors")) continue;
      EXPECT_TRUE(second.count(name) == 1 && second.at(name) == bytes) << name;
      ++shards;
    }
    EXPECT_EQ(shards, mesh.ranks());
  }
}

// Checkpoints know nothing of devices: ten steps on one go on for ten on the other as if nothing had changed.
TEST_F(TrainOnGpu, CheckpointsMoveBetweenGpusAndCpus) {
  struct Place {
    Mesh mesh;
    Strings overrides;
  };
  const Place cpu = {{1, 1}, {"device=CPU", "compute=F32"}}, cpu_cp = {{1, 2}, {"device=CPU", "compute=F32"}};
  const Place f32 = {{1, 1}, {"compute=F32"}}, bf16 = {{1, 1}, {"compute=BF16"}};
  const Place bf16_cp = {{1, 2}, {"compute=BF16"}};
  struct Move {
    const char* run;
    Place from, to;
    double bound;
  };
  const Move moves[] = {{"f32 to CPU", f32, cpu, kF32.in_20_steps},
                        {"CPU to f32", cpu, f32, kF32.in_20_steps},
                        {"bf16 to CPUs", bf16, cpu_cp, kBf16.in_20_steps},
                        {"CPU to bf16 on two ranks", cpu, bf16_cp, kBf16.in_20_steps}};
  Train(cpu.mesh, "whole", Joined({"optim.steps=20", "eval.every_steps=10"}, cpu.overrides));
  for (const Move& move : moves) {
    SCOPED_TRACE(move.run);
    Train(move.from.mesh, move.run, Joined({"optim.steps=10", "eval.every_steps=10"}, move.from.overrides));
    EXPECT_EQ(SavedStep(move.run), 10);
    Train(move.to.mesh, move.run, Joined({"optim.steps=20", "eval.every_steps=10"}, move.to.overrides),
          {"--resume"});
    ExpectWholeMetrics(Path(move.run), 20, 10);
    EXPECT_LE(LossDifference(Path(move.run), Path("whole"), 20), move.bound);
  }
}

// ---- A known end.

TEST_F(TrainOnGpu, AKilledRankEndsTheJob) {
  const Mesh mesh = {2, 2};
  Job job(SpecOf(mesh, "run", endless_));
  ASSERT_NO_FATAL_FAILURE(AwaitStep30(job));
  const std::vector<pid_t> ranks = job.RankProcesses();
  ASSERT_EQ(ranks.size(), 4u);
  const auto killed = std::chrono::steady_clock::now();
  ASSERT_EQ(kill(ranks[1], SIGKILL), 0);
  const JobResult result = job.Wait(20);
  EXPECT_TRUE(result.in_time) << result;
  EXPECT_LT(SecondsSince(killed), 10) << result;
  EXPECT_NE(result.exit_code, 0) << result;
  // mpirun says which rank it was; how far the job had come is what rank 0 printed last.
  EXPECT_TRUE(absl::StrContains(result.err, "process rank 1 with PID ")) << result;
  EXPECT_TRUE(Finds(result.out, "step [0-9]+/10000000 ")) << result;
  ExpectGoesOn(mesh);
}

TEST_F(TrainOnGpu, AStoppedRankIsReportedByAllOthers) {
  const Mesh mesh = {2, 2};
  constexpr int kStopped = 2;
  Strings overrides = endless_;
  overrides.push_back("step_deadline_seconds=10");
  Job job(SpecOf(mesh, "run", overrides));
  ASSERT_NO_FATAL_FAILURE(AwaitStep30(job));
  const std::vector<pid_t> ranks = job.RankProcesses();
  ASSERT_EQ(ranks.size(), 4u);
  const auto stopped = std::chrono::steady_clock::now();
  ASSERT_EQ(kill(ranks[kStopped], SIGSTOP), 0);
  const JobResult result = job.Wait(40);
  EXPECT_TRUE(result.in_time) << result;
  EXPECT_LT(SecondsSince(stopped), 10 + 10) << result;
  EXPECT_NE(result.exit_code, 0) << result;
  for (int rank = 0; rank < mesh.ranks(); ++rank) {
    if (rank == kStopped) continue;
    const std::string report =
        absl::StrCat("annulus: watchdog: rank ", rank, ": no progress for 1[0-9.]+ s in step [0-9]+\n");
    EXPECT_TRUE(Finds(result.err, report)) << "rank " << rank << ": " << result;
  }
  ExpectGoesOn(mesh);
}

TEST_F(TrainOnGpu, ARunThatNoGpuCouldHoldIsRefused) {
  const JobResult result =
      RunJob(SpecOf({1, 2}, "run", {"model.d_model=65536", "model.mlp.d_ff=1000000"}), kSecondsToTrain);
  EXPECT_TRUE(result.in_time && result.exit_code != 0)
      << result;  // launch/mpirun may have to end an mpirun that hangs
  EXPECT_TRUE(absl::StartsWith(result.err, "error: memory: ")) << result;
  EXPECT_TRUE(Finds(result.err, "memory: a rank is planned to hold [0-9.]+ TiB")) << result;
  EXPECT_TRUE(absl::StrContains(result.err, DescribeGpu(0)->name)) << result;
  EXPECT_FALSE(std::filesystem::exists(Path("run"))) << "it never started";
}

// The same where the GPU could, were it not for others.
TEST_F(TrainOnGpu, ARunThatAFilledGpuCannotHoldIsRefused) {
  const MemoryFiller others(0, int64_t{1} << 30);
  const JobResult result =
      RunJob(SpecOf({1, 1}, "run", {"model.d_model=4096", "model.mlp.d_ff=16384"}), kSecondsToTrain);
  EXPECT_TRUE(result.in_time && result.exit_code != 0)
      << result;  // launch/mpirun may have to end an mpirun that hangs
  EXPECT_TRUE(absl::StartsWith(result.err, "error: memory: ")) << result;
  EXPECT_TRUE(Finds(result.err, "memory: a rank is planned to hold [0-9.]+ GiB")) << result;
  EXPECT_TRUE(Finds(result.err, "of the ([0-9.]+ [KM]?i?B|1.0 GiB) that are available to 1 rank on "))
      << result;
  EXPECT_FALSE(std::filesystem::exists(Path("run"))) << "it never started";
}

// A run has all its memory from its first step on: what it saves and evaluates later needs no more.
TEST_F(TrainOnGpu, MemoryThatOthersTakeLaterStopsNothing) {
  Strings overrides = endless_;
  overrides.insert(overrides.end(), {"model.d_model=512", "model.mlp.d_ff=2048"});
  Job job(SpecOf({1, 2}, "run", overrides));
  ASSERT_NO_FATAL_FAILURE(AwaitStep30(job));
  const MemoryFiller others(0, 0);
  const int64_t filled = LastStep(Path("run"));
  const auto goes_on = [&] { return LastStep(Path("run")) >= filled + 50; };
  ASSERT_TRUE(job.WaitWhileRunning(goes_on, kSecondsToTrain)) << job.Wait(0);
  EXPECT_GT(SavedStep("run"), filled);
}

}  // namespace
}  // namespace annulus::testing
