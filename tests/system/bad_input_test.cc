// Whatever is wrong with the input: the whole job ends by itself within seconds with one error that names
// what is wrong, and nothing that was there is lost.

#include <sys/resource.h>

#include "absl/strings/str_replace.h"
#include "system/tiny_run.h"

namespace annulus::testing {
namespace {

using Strings = std::vector<std::string>;

constexpr double kSecondsToEnd = 20;

void ExpectOneError(const JobResult& result, const std::string& folder, const Strings& parts) {
  EXPECT_TRUE(result.in_time) << result;
  EXPECT_NE(result.exit_code, 0) << result;
  EXPECT_EQ(ErrorLines(result).size(), 1u) << result;
  for (const std::string& part : parts) {
    EXPECT_TRUE(absl::StrContains(result.err, part)) << "lacks \"" << part << "\": " << result;
  }
  for (const char* crash : {"invariant broken", "Signal:", "signal ", "core dumped", "terminate called"}) {
    EXPECT_FALSE(absl::StrContains(result.err, crash)) << crash << ": " << result;
  }
  for (const std::string& name : Names(folder)) EXPECT_FALSE(absl::StartsWith(name, "core")) << name;
}

struct BadInput {
  const char* name;
  Strings arguments;  // after "train", or all of them if there is no configuration file among them
  Strings error;      // parts that the message must hold
  std::function<void(const std::string& folder)> prepare = [](const std::string&) {};
};

std::ostream& operator<<(std::ostream& os, const BadInput& bad) { return os << bad.name; }
std::string NameOf(const ::testing::TestParamInfo<BadInput>& info) { return info.param.name; }

// A change of the configuration file that must apply.
std::function<void(const std::string&)> Edit(const std::string& from, const std::string& to) {
  return [from, to](const std::string& folder) {
    std::string text = kTinyConfig;
    ASSERT_EQ(absl::StrReplaceAll({{from, to}}, &text), 1) << from;
    Overwrite(folder + "/c.textproto", text);
  };
}

template <typename T>
void Append(std::string* bytes, T value) {
  bytes->append(reinterpret_cast<const char*>(&value), sizeof(T));
}

void UseLlmCFileWithALargeToken(const std::string& folder) {
  Edit("text { path: \"text.txt\" }", "llmc { path: \"t.bin\" }")(folder);
  constexpr int32_t kTokens = 2000;
  std::string bytes;
  for (const int32_t value : {20240520, 1, kTokens}) Append(&bytes, value);
  bytes.resize(1024);
  for (int32_t i = 0; i < kTokens; ++i) Append(&bytes, static_cast<uint16_t>(i % 50 == 49 ? 60000 : i % 50));
  Overwrite(folder + "/t.bin", bytes);
}

void UseTruncatedMegatronIndex(const std::string& folder) {
  Edit("text { path: \"text.txt\" }", "megatron { prefix: \"m\" }")(folder);
  Overwrite(folder + "/m.bin", std::string(8000, '\0'));
  std::string index("MMIDIDX\0\0", 9);
  Append<uint64_t>(&index, 1);    // version
  Append<uint8_t>(&index, 8);     // uint16
  Append<uint64_t>(&index, 100);  // sequences
  Append<uint64_t>(&index, 101);  // documents
  Overwrite(folder + "/m.idx", index + std::string(64, '\1'));
}

class FreshRun : public ::testing::TestWithParam<BadInput> {};

TEST_P(FreshRun, EndsWithOneError) {
  const TemporaryFolder folder;
  WriteTinyInputs(folder.path());
  GetParam().prepare(folder.path());
  ASSERT_FALSE(HasFatalFailure());
  Strings arguments = {"train"};
  arguments.insert(arguments.end(), GetParam().arguments.begin(), GetParam().arguments.end());
  const JobResult result =
      RunJob({.folder = folder.path(), .ranks = 2, .arguments = arguments}, kSecondsToEnd);
  ExpectOneError(result, folder.path(), GetParam().error);
  EXPECT_FALSE(std::filesystem::exists(folder.path() + "/run"))
      << "a run that never started leaves no directory";
}

const Strings kFresh = {"c.textproto", "--run_dir", "run"};
Strings With(const Strings& arguments, const Strings& more) {
  Strings all = arguments;
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

const BadInput kBadConfigurations[] = {
    {"NoConfigFile", {"absent.textproto"}, {"absent.textproto", "No such file"}},
    {"UnknownField",
     kFresh,
     {"c.textproto:16:", "optim.adamw.lrr", "did you mean `lr`"},
     Edit("lr: 1e-2", "lrr: 1")},
    {"OutOfRange", With(kFresh, {"--set", "optim.adamw.lr=-1"}), {"--set optim.adamw.lr=-1", "expected"}},
    {"MeshAndWorld", With(kFresh, {"--set", "parallel.cp=3"}), {"parallel.cp=3", "2"}},
    {"BatchAndMesh",
     With(kFresh, {"--set", "optim.sequences_per_step=3"}),
     {"optim.sequences_per_step=3", "expected"}},
    {"TensorParallel", With(kFresh, {"--set", "parallel.tp=64"}), {"parallel.", "expected"}},
    {"TooLongSequence",
     With(kFresh, {"--set", "data.seq_len=2000000000"}),
     {"data.seq_len=2000000000", "1073741824"}},
    {"SampleWithoutBytes",
     With(kFresh, {"--set", "model.vocab_size=200", "--set", "sample.tokens=5"}),
     {"sample.tokens=5", "model.vocab_size=200"}},
    {"TooLargeForTheMemory",
     With(kFresh, {"--set", "model.d_model=65536", "--set", "model.mlp.d_ff=1000000"}),
     {"memory:", "optim.micro_batch=2", "available to 2 ranks on "}},
    {"UnknownOption", With(kFresh, {"--resum"}), {"unknown option --resum"}},
};
INSTANTIATE_TEST_SUITE_P(Configuration, FreshRun, ::testing::ValuesIn(kBadConfigurations), NameOf);

const BadInput kBadData[] = {
    {"MissingFile",
     With(kFresh, {"--set", "data.train[0].text.path=gone.txt"}),
     {"gone.txt", "No such file"}},
    {"TooShort", With(kFresh, {"--set", "data.seq_len=100000"}), {"text.txt", "100001 (data.seq_len + 1)"}},
    {"TruncatedIndex",
     With(kFresh, {"--set", "model.vocab_size=300"}),
     {"m.idx", "expected"},
     UseTruncatedMegatronIndex},
};
INSTANTIATE_TEST_SUITE_P(Data, FreshRun, ::testing::ValuesIn(kBadData), NameOf);

const BadInput kBadRunDirectories[] = {
    {"BelowAFile", {"c.textproto", "--run_dir", "text.txt/run"}, {"text.txt/run", "Not a directory"}},
    {"ResumeWithoutRun",
     With(kFresh, {"--resume"}),
     {"--run_dir=run", "expected the directory of an earlier run"}},
    {"ResumeWithoutName", {"c.textproto", "--resume"}, {"--resume: expected --run_dir"}},
};
INSTANTIATE_TEST_SUITE_P(RunDirectory, FreshRun, ::testing::ValuesIn(kBadRunDirectories), NameOf);

// A token outside the vocabulary is met when it is read: the directory is there by then, and says what
// happened.
TEST(BadToken, EndsWithOneError) {
  const TemporaryFolder folder;
  WriteTinyInputs(folder.path());
  UseLlmCFileWithALargeToken(folder.path());
  const JobResult result = RunJob(TrainJob(folder.path(), 2, "run", {"model.vocab_size=300"}), kSecondsToEnd);
  ExpectOneError(result, folder.path(), {"t.bin", "60000", "300"});
}

// ---- A run that exists, with checkpoints of the steps 2 and 4.

class ExistingRun : public ::testing::TestWithParam<BadInput> {
 protected:
  static void SetUpTestSuite() {
    made_ = std::make_unique<TemporaryFolder>();
    WriteTinyInputs(made_->path());
    ExpectDone(RunJob(TrainJob(made_->path(), 2, "run", {"optim.steps=4", "checkpoint.every_steps=2"})));
  }
  static void TearDownTestSuite() { made_.reset(); }

  static std::unique_ptr<TemporaryFolder> made_;
};
std::unique_ptr<TemporaryFolder> ExistingRun::made_;

TEST_P(ExistingRun, IsRefusedAndLosesNothing) {
  const TemporaryFolder folder;
  std::filesystem::copy(made_->path(), folder.path(), std::filesystem::copy_options::recursive);
  GetParam().prepare(folder.path());
  ASSERT_FALSE(HasFatalFailure());
  const std::string run = folder.path() + "/run";
  const std::map<std::string, std::string> before = Snapshot(run);
  Strings arguments = {"train", "c.textproto", "--run_dir", "run"};
  arguments.insert(arguments.end(), GetParam().arguments.begin(), GetParam().arguments.end());
  const JobResult result =
      RunJob({.folder = folder.path(), .ranks = 2, .arguments = arguments}, kSecondsToEnd);
  ExpectOneError(result, folder.path(), GetParam().error);
  EXPECT_EQ(Snapshot(run), before);
}

const char kNewest[] = "/run/ckpt/step-00000004/";

void FlipABit(const std::string& folder) {
  const std::string path = folder + kNewest + "shard-00001.safetensors";
  std::string bytes = Contents(path);
  ASSERT_GT(bytes.size(), 1000u);
  bytes[bytes.size() / 2] ^= 4;
  Overwrite(path, bytes);
}

void RemoveAShard(const std::string& folder) {
  ASSERT_TRUE(std::filesystem::remove(folder + kNewest + "shard-00000.safetensors"));
}

const Strings kResume = {"--resume", "--set", "optim.steps=6"};
const BadInput kBadResumes[] = {
    {"WithoutResume", {}, {"--run_dir=run", "already holds a run", "--resume"}},
    {"FlippedBit", kResume, {"step-00000004/shard-00001.safetensors", "step-00000002"}, FlipABit},
    {"MissingShard", kResume, {"step-00000004/shard-00000.safetensors", "step-00000002"}, RemoveAShard},
    {"OtherModel", With(kResume, {"--set", "model.d_model=32"}), {"step-00000004", "another model"}},
    {"OtherSeed", With(kResume, {"--set", "seed=8"}), {"step-00000004", "seed=8", "expected 7"}},
    {"OtherBatch",
     With(kResume, {"--set", "optim.sequences_per_step=8"}),
     {"optim.sequences_per_step=8", "expected 4"}},
    {"OtherData", With(kResume, {"--set", "data.seq_len=24"}), {"step-00000004", "data sources differ"}},
    {"BeyondTheEnd",
     {"--resume", "--set", "optim.steps=3"},
     {"step-00000004", "optim.steps=3", "expected at least 4"}},
    {"OtherPrecision", With(kResume, {"--set", "compute=F64"}), {"step-00000004", "f64"}},
};
INSTANTIATE_TEST_SUITE_P(Checkpoint, ExistingRun, ::testing::ValuesIn(kBadResumes), NameOf);

// ---- Failures in the middle of a run.

class FailingRun : public ::testing::Test {
 protected:
  FailingRun() { WriteTinyInputs(folder_.path()); }
  const TemporaryFolder folder_;
  const std::string run_ = folder_.path() + "/run";
};

// The ranks' files may suddenly not grow beyond what logs need: a save fails as on a full disk.
TEST_F(FailingRun, FullDiskDuringASaveLeavesThePreviousCheckpointWhole) {
  constexpr rlim_t kMaxFileBytes = 256 << 10;  // logs stay below, shards of this model are larger
  const Strings overrides = {"model.d_model=64", "model.mlp.d_ff=128", "optim.steps=200",
                             "checkpoint.every_steps=10", "eval.every_steps=100"};
  Job job(TrainJob(folder_.path(), 2, "run", overrides));
  ASSERT_TRUE(job.WaitWhileRunning([this] { return std::filesystem::exists(run_ + "/ckpt/LATEST"); }, 30))
      << job.Wait(0);
  const std::vector<pid_t> ranks = job.RankProcesses();
  ASSERT_EQ(ranks.size(), 2u);
  for (const pid_t rank : ranks) {
    const rlimit limit = {kMaxFileBytes, kMaxFileBytes};
    ASSERT_EQ(prlimit(rank, RLIMIT_FSIZE, &limit, nullptr), 0);
  }
  const JobResult result = job.Wait(kSecondsToEnd);
  ExpectOneError(result, folder_.path(), {"run/ckpt/.tmp-step-", "shard-0000", "File too large"});

  const absl::StatusOr<Checkpoint> saved = Checkpoint::Open(run_ + "/ckpt");
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_GE(saved->meta().step, 10);
  EXPECT_LT(saved->meta().step, 200);
  for (const std::string& name : Names(run_ + "/ckpt")) EXPECT_FALSE(absl::StartsWith(name, ".tmp-")) << name;

  ExpectDone(RunJob(TrainJob(folder_.path(), 2, "run", overrides, {"--resume"})));
  ExpectDone(RunJob(TrainJob(folder_.path(), 2, "whole", overrides)));
  EXPECT_EQ(MetricsDifference(run_, folder_.path() + "/whole", 0), "");
  EXPECT_EQ(CheckpointDifference(run_, folder_.path() + "/whole"), "");
}

// Weights that a first update of this size leaves overflow float32 in the next forward pass.
const char kOverflow[] = "optim.adamw.lr=1e9";
const char kNoWarmup[] = "optim.schedule.constant.warmup_steps=0";

TEST_F(FailingRun, StepsThatAreNotFiniteStopAndTheStepsBeforeAreSaved) {
  const JobResult result = RunJob(TrainJob(folder_.path(), 2, "run", {kOverflow, kNoWarmup}), kSecondsToEnd);
  ExpectOneError(result, folder_.path(), {"step 2: loss=", "expected finite values", "nan_policy: STOP"});
  EXPECT_EQ(ReadMetrics(run_).size(), 1u);
  const absl::StatusOr<Checkpoint> saved = Checkpoint::Open(run_ + "/ckpt");
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(saved->meta().step, 1);
}

TEST_F(FailingRun, ADataFileThatShrinksIsNamed) {
  Job job(TrainJob(folder_.path(), 2, "run", {"optim.steps=100000"}));
  ASSERT_TRUE(job.WaitWhileRunning([this] { return ReadMetrics(run_).size() > 2; }, 30)) << job.Wait(0);
  std::filesystem::resize_file(folder_.path() + "/text.txt", 100);
  ExpectOneError(job.Wait(kSecondsToEnd), folder_.path(), {"text.txt: shrank from", "to 100 bytes"});
}

TEST_F(FailingRun, ASecondJobInTheSameDirectoryIsRefused) {
  ExpectDone(RunJob(TrainJob(folder_.path(), 2, "run", {"optim.steps=4"})));
  const absl::StatusOr<FileLock> first = FileLock::Take(run_ + "/lock", "a run, pid 1 on elsewhere");
  ASSERT_TRUE(first.ok()) << first.status();
  const JobResult second =
      RunJob(TrainJob(folder_.path(), 2, "run", {"optim.steps=6"}, {"--resume"}), kSecondsToEnd);
  ExpectOneError(second, folder_.path(), {"run/lock: is held by a run, pid 1 on elsewhere"});
  EXPECT_EQ(ReadMetrics(run_).size(), 4u);
}

TEST_F(FailingRun, StepsThatAreNotFiniteAreSkippedWhenAsked) {
  ExpectDone(
      RunJob(TrainJob(folder_.path(), 2, "run", {kOverflow, kNoWarmup, "nan_policy=SKIP", "optim.steps=5"})));
  const std::vector<nlohmann::json> lines = ReadMetrics(run_);
  ASSERT_EQ(lines.size(), 5u);
  for (size_t i = 0; i < lines.size(); ++i) {
    ASSERT_TRUE(lines[i].is_object());
    EXPECT_EQ(lines[i].value("skipped", false), i > 0) << lines[i];
    EXPECT_EQ(lines[i]["grad_norm"].is_number(), i == 0) << lines[i];
  }
}

TEST_F(FailingRun, SkippingForEverStops) {
  const Strings overrides = {kOverflow, kNoWarmup, "nan_policy=SKIP", "optim.steps=100"};
  const JobResult result = RunJob(TrainJob(folder_.path(), 2, "run", overrides), kSecondsToEnd);
  ExpectOneError(result, folder_.path(), {"step 11", "10 steps in a row"});
}

}  // namespace
}  // namespace annulus::testing
