#include "annulus/train/checkpoint.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "checkpoint/checkpoint_testing.h"

namespace annulus {
namespace {

using testing::Contents;
using testing::Difference;
using testing::Names;
using testing::OnRanks;
using testing::Overwrite;
using testing::Sample;
using testing::Save;
using testing::SaveOnRanks;
using testing::TemporaryDirectory;
using Strings = std::vector<std::string>;

class CheckpointTest : public ::testing::Test {
 protected:
  const std::string& directory() const { return directory_.path(); }
  std::string Path(const std::string& name) const { return directory() + "/" + name; }

 private:
  TemporaryDirectory directory_;
};

TEST_F(CheckpointTest, AnyNumberOfRanksReadsWhatAnyOtherWrote) {
  for (int writers = 1; writers <= 4; ++writers) {
    const Sample sample(500 + writers);
    Save(writers, directory(), sample, 1);
    EXPECT_EQ(Difference(Checkpoint::Open(directory()), sample), "");
    for (int readers = 1; readers <= 4; ++readers) {
      const Strings differences = OnRanks(readers, [&](Communicator& world) {
        return Difference(Checkpoint::Open(world, directory()), sample);
      });
      for (const std::string& difference : differences)
        EXPECT_EQ(difference, "") << writers << " writers, " << readers << " readers";
    }
  }
}

TEST_F(CheckpointTest, FilesAreWhatTheHeaderSays) {
  const Sample sample(500);
  Save(3, directory(), sample, 2);
  EXPECT_EQ(Names(directory()), (Strings{"LATEST", "step-00000500"}));
  EXPECT_EQ(Contents(Path("LATEST")), "step-00000500\n");
  const std::string step = Path("step-00000500");
  EXPECT_EQ(Names(step), (Strings{"COMMIT", "manifest.json", "shard-00000.safetensors",
                                  "shard-00001.safetensors", "shard-00002.safetensors"}));
  const std::string manifest = Contents(step + "/manifest.json");
  EXPECT_EQ(Contents(step + "/COMMIT"), Hex64(Hash64(manifest)) + "\n");

  const nlohmann::json parsed = nlohmann::json::parse(manifest, nullptr, false);
  EXPECT_EQ(parsed["meta"]["step"], 500);
  EXPECT_EQ(parsed["meta"]["seed"], sample.meta().seed);
  EXPECT_EQ(parsed["meta"]["config"], sample.meta().config);
  ASSERT_EQ(parsed["files"].size(), 3u);
  for (const nlohmann::json& file : parsed["files"]) {
    const std::string bytes = Contents(step + "/" + file["name"].get<std::string>());
    EXPECT_EQ(file["bytes"], bytes.size());
    EXPECT_EQ(file["hash"], Hex64(Hash64(bytes)));
  }
}

TEST_F(CheckpointTest, OpensADirectoryOfStepsOrOneStep) {
  const Sample first(1), second(2);
  Save(2, directory(), first, 2);
  Save(1, directory(), second, 2);
  EXPECT_EQ(Difference(Checkpoint::Open(directory()), second), "");
  EXPECT_EQ(Difference(Checkpoint::Open(directory() + "/"), second), "");
  EXPECT_EQ(Difference(Checkpoint::Open(Path("step-00000001")), first), "");
  EXPECT_EQ(Difference(Checkpoint::Open(Path("step-00000001//")), first), "");
  EXPECT_EQ(Checkpoint::Open(directory())->path(), Path("step-00000002"));
}

TEST_F(CheckpointTest, SurvivesMoves) {
  const Sample sample(1);
  Save(2, directory(), sample, 1);
  absl::StatusOr<Checkpoint> opened = Checkpoint::Open(directory());
  ASSERT_TRUE(opened.ok());
  const Checkpoint moved = *std::move(opened);
  EXPECT_EQ(Difference(moved, sample), "");
  EXPECT_EQ(moved.Find("none").status(), absl::NotFoundError("tensor \"none\" is not in this checkpoint"));
}

TEST_F(CheckpointTest, CreatesTheDirectoryAndAcceptsNoTensors) {
  const std::string deep = Path("a/b");
  const std::vector<absl::Status> saved =
      OnRanks(2, [&](Communicator& world) { return SaveCheckpoint(world, deep, CheckpointMeta(), {}, 1); });
  for (const absl::Status& status : saved) EXPECT_TRUE(status.ok()) << status;
  const absl::StatusOr<Checkpoint> opened = Checkpoint::Open(deep);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_TRUE(opened->tensor_names().empty());
}

TEST_F(CheckpointTest, RanksWithoutTensorsWriteNoFile) {
  const Sample sample(4);
  const std::vector<absl::Status> saved = OnRanks(3, [&](Communicator& world) {
    return SaveCheckpoint(world, directory(), sample.meta(),
                          world.rank() == 1 ? sample.tensors() : std::vector<NamedTensor>{}, 1);
  });
  for (const absl::Status& status : saved) EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(Names(Path("step-00000004")), (Strings{"COMMIT", "manifest.json", "shard-00001.safetensors"}));
  EXPECT_EQ(Difference(Checkpoint::Open(directory()), sample), "");
}

TEST_F(CheckpointTest, KeepsTheNewest) {
  for (int64_t step = 1; step <= 5; ++step) Save(1, directory(), Sample(step), 2);
  EXPECT_EQ(Names(directory()), (Strings{"LATEST", "step-00000004", "step-00000005"}));
  Save(2, directory(), Sample(6), 1);
  EXPECT_EQ(Names(directory()), (Strings{"LATEST", "step-00000006"}));
}

TEST_F(CheckpointTest, ARunContinuedFromAnEarlierStepLeavesLaterOnesUntilItPassesThem) {
  for (int64_t step : {10, 20, 30}) Save(1, directory(), Sample(step), 3);
  Save(1, directory(), Sample(15), 1);
  EXPECT_EQ(Names(directory()), (Strings{"LATEST", "step-00000015", "step-00000020", "step-00000030"}));
  EXPECT_EQ(Difference(Checkpoint::Open(directory()), Sample(15)),
            "");  // what was saved last, not the highest
  Save(1, directory(), Sample(40), 1);
  EXPECT_EQ(Names(directory()), (Strings{"LATEST", "step-00000040"}));
}

TEST_F(CheckpointTest, ReplacesAStepThatExists) {
  Save(3, directory(), Sample(7), 2);
  const Sample again(1007);  // step 7 with other contents
  ASSERT_EQ(again.step(), 7);
  Save(2, directory(), again, 2);
  EXPECT_EQ(Names(directory()), (Strings{"LATEST", "step-00000007"}));
  EXPECT_EQ(Difference(Checkpoint::Open(directory()), again), "");
}

TEST_F(CheckpointTest, LeftoversOfCrashesAreIgnoredAndRemoved) {
  const Sample sample(7), next(8);
  Save(1, directory(), sample, 1);
  ASSERT_TRUE(MakeDirectories(Path(".tmp-step-00000009")).ok());
  Overwrite(Path(".tmp-step-00000009/shard-00000.safetensors"), "torn");
  ASSERT_TRUE(MakeDirectories(Path("step-00000003")).ok());  // COMMIT is gone: being deleted
  Overwrite(Path("step-00000003/manifest.json"), "{}");
  Overwrite(Path("LATEST.tmp"), "step-0000");
  EXPECT_EQ(Difference(Checkpoint::Open(directory()), sample), "");
  Save(1, directory(), next, 2);
  EXPECT_EQ(Names(directory()), (Strings{"LATEST", "step-00000007", "step-00000008"}));
}

TEST_F(CheckpointTest, AReplacedStepCountsUntilTheNewOneIsThere) {
  const Sample sample(7), next(8);
  Save(1, directory(), sample, 1);
  ASSERT_TRUE(Rename(Path("step-00000007"), Path("step-00000007.old")).ok());
  EXPECT_EQ(Difference(Checkpoint::Open(directory()), sample), "");
  Save(1, directory(), next, 2);
  EXPECT_EQ(Names(directory()), (Strings{"LATEST", "step-00000007", "step-00000008"}));
  EXPECT_EQ(Difference(Checkpoint::Open(Path("step-00000007")), sample), "");
}

TEST_F(CheckpointTest, ATornLatestLosesNothing) {
  const Sample first(1), second(2);
  Save(1, directory(), first, 2);
  Save(1, directory(), second, 2);
  for (const std::string torn : {"", "step-", "step-000000", "step-00000001 ", "step-00000009\n", "\xff\xfe",
                                 "../step-00000001\n", "step-1\n", "step--0000001\n"}) {
    Overwrite(Path("LATEST"), torn);
    EXPECT_EQ(Difference(Checkpoint::Open(directory()), second), "") << torn;
  }
  Overwrite(Path("LATEST"), "step-00000001\n");
  EXPECT_EQ(Difference(Checkpoint::Open(directory()), first), "");
  ASSERT_TRUE(RemoveAll(Path("LATEST")).ok());
  EXPECT_EQ(Difference(Checkpoint::Open(directory()), second), "");
  ASSERT_TRUE(MakeDirectories(Path("LATEST")).ok());
  EXPECT_EQ(Difference(Checkpoint::Open(directory()), second), "");
}

TEST_F(CheckpointTest, NotFoundWithoutACommittedStep) {
  const auto expect_not_found = [](const std::string& path) {
    const absl::Status status = Checkpoint::Open(path).status();
    EXPECT_TRUE(absl::IsNotFound(status)) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), path)) << status;
  };
  expect_not_found(Path("none"));
  expect_not_found(directory());
  Overwrite(Path("file"), "x");
  expect_not_found(Path("file"));
  ASSERT_TRUE(MakeDirectories(Path("step-00000001")).ok());
  expect_not_found(directory());
  const std::vector<absl::Status> statuses =
      OnRanks(3, [&](Communicator& world) { return Checkpoint::Open(world, Path("none")).status(); });
  for (const absl::Status& status : statuses) {
    EXPECT_TRUE(absl::IsNotFound(status)) << status;
    EXPECT_EQ(status, statuses[0]);
  }
}

void ExpectSameError(const std::vector<absl::Status>& statuses, absl::StatusCode code,
                     const std::string& message) {
  for (const absl::Status& status : statuses) {
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), message)) << status << "\nexpected: " << message;
    EXPECT_EQ(status, statuses[0]);
  }
}

TEST_F(CheckpointTest, BadArgumentsAreRefusedOnEveryRank) {
  const Sample sample(1);
  const auto save = [&](CheckpointMeta meta, int64_t keep) {
    return OnRanks(2, [&](Communicator& world) {
      return SaveCheckpoint(world, directory(), meta, sample.tensors_of(world.rank(), 2), keep);
    });
  };
  const absl::StatusCode invalid = absl::StatusCode::kInvalidArgument;
  ExpectSameError(save(sample.meta(), 0), invalid, "checkpoint.keep=0: expected at least 1");
  CheckpointMeta meta = sample.meta();
  meta.step = -1;
  ExpectSameError(save(meta, 1), invalid, "step=-1: expected at least 0");
  meta = sample.meta();
  meta.config = "\xff";
  ExpectSameError(save(meta, 1), invalid, "expected UTF-8 text");
  EXPECT_EQ(Names(directory()), Strings{});
}

TEST_F(CheckpointTest, ATensorOfTwoRanksIsRefused) {
  const Sample sample(1);
  const std::vector<absl::Status> statuses = OnRanks(3, [&](Communicator& world) {
    return SaveCheckpoint(world, directory(), sample.meta(),
                          world.rank() == 1 ? std::vector<NamedTensor>{} : sample.tensors(), 1);
  });
  ExpectSameError(statuses, absl::StatusCode::kInvalidArgument,
                  "is in shard-00000.safetensors and in shard-00002.safetensors");
  EXPECT_EQ(Names(directory()), Strings{});
}

TEST_F(CheckpointTest, AnErrorOfOneRankIsReturnedByAllAndHarmsNothing) {
  const Sample sample(1), next(2);
  Save(1, directory(), sample, 1);
  const std::vector<absl::Status> statuses = OnRanks(3, [&](Communicator& world) {
    std::vector<NamedTensor> tensors = next.tensors_of(world.rank(), 3);
    if (world.rank() == 2) tensors.push_back(tensors[0]);
    return SaveCheckpoint(world, directory(), next.meta(), tensors, 1);
  });
  ExpectSameError(statuses, absl::StatusCode::kInvalidArgument, "rank 2: ");
  EXPECT_EQ(Difference(Checkpoint::Open(directory()), sample), "");
  EXPECT_EQ(Names(directory()), (Strings{"LATEST", "step-00000001"}));
}

TEST_F(CheckpointTest, AnUnwritableDirectoryIsNamed) {
  Overwrite(Path("file"), "x");
  for (const std::string& path : {Path("file"), Path("file/ckpt"), std::string("/proc/ckpt")}) {
    const std::vector<absl::Status> statuses = SaveOnRanks(2, path, Sample(1), 1);
    EXPECT_FALSE(statuses[0].ok());
    ExpectSameError(statuses, statuses[0].code(), path);
  }
}

}  // namespace
}  // namespace annulus
