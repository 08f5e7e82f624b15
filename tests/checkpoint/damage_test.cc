// Whatever happens to a committed checkpoint's files is noticed and named, on every rank.

#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "annulus/base/hash.h"
#include "checkpoint/checkpoint_testing.h"

namespace annulus {
namespace {

using nlohmann::json;
using testing::Contents;
using testing::Difference;
using testing::Names;
using testing::OnRanks;
using testing::Overwrite;
using testing::Sample;
using testing::Save;
using testing::TemporaryDirectory;

class DamageTest : public ::testing::Test {
 protected:
  DamageTest() : step_(directory_.path() + "/step-00000005") { Save(2, directory_.path(), sample_, 1); }

  // Opens as one rank; expects DataLoss that names `file`.
  void ExpectDataLoss(const std::string& file, const std::string& what) {
    const absl::Status status = Checkpoint::Open(directory_.path()).status();
    EXPECT_TRUE(absl::IsDataLoss(status)) << what << ": " << status;
    EXPECT_TRUE(absl::StrContains(status.message(), step_ + "/" + file)) << what << ": " << status;
  }

  const Sample sample_ = Sample(5);
  TemporaryDirectory directory_;
  std::string step_;
};

TEST_F(DamageTest, AFlippedBitAnywhereIsNoticed) {
  for (const std::string& file : Names(step_)) {
    const std::string path = step_ + "/" + file, whole = Contents(path);
    ASSERT_GT(whole.size(), 0u);
    std::vector<size_t> positions;  // about 150 in each file, which is all of COMMIT, and the last byte
    for (size_t at = 0; at < whole.size(); at += whole.size() / 150 + 1) positions.push_back(at);
    positions.push_back(whole.size() - 1);
    for (const size_t at : positions) {
      std::string damaged = whole;
      damaged[at] = static_cast<char>(damaged[at] ^ (1 << (at % 8)));
      Overwrite(path, damaged);
      ExpectDataLoss(file, absl::StrCat("bit of byte ", at));
    }
    Overwrite(path, whole);
  }
  EXPECT_EQ(Difference(Checkpoint::Open(directory_.path()), sample_), "");
}

TEST_F(DamageTest, AnotherLengthIsNoticed) {
  for (const std::string& file : Names(step_)) {
    const std::string path = step_ + "/" + file, whole = Contents(path);
    for (const size_t length : {size_t{0}, size_t{1}, size_t{7}, whole.size() / 2, whole.size() - 1}) {
      Overwrite(path, whole.substr(0, length));
      ExpectDataLoss(file, absl::StrCat("cut to ", length));
    }
    Overwrite(path, whole + '\0');
    ExpectDataLoss(file, "one byte more");
    Overwrite(path, whole);
  }
}

TEST_F(DamageTest, AMissingFileIsNoticed) {
  for (const std::string& file : Names(step_)) {
    const std::string path = step_ + "/" + file, whole = Contents(path);
    ASSERT_TRUE(RemoveAll(path).ok());
    ExpectDataLoss(file, "missing");
    Overwrite(path, whole);
  }
}

TEST_F(DamageTest, ExchangedShardsAreNoticed) {
  const std::string a = step_ + "/shard-00000.safetensors", b = step_ + "/shard-00001.safetensors";
  const std::string contents = Contents(a);
  Overwrite(a, Contents(b));
  Overwrite(b, contents);
  ExpectDataLoss("shard-00000.safetensors", "exchanged");
}

TEST_F(DamageTest, EveryRankReturnsTheSameError) {
  const std::string path = step_ + "/shard-00001.safetensors", whole = Contents(path);
  std::string damaged = whole;
  damaged.back() =
      static_cast<char>(damaged.back() ^ 1);  // data: only the rank that hashes this file sees it
  Overwrite(path, damaged);
  for (const int ranks : {1, 2, 3, 4}) {
    const std::vector<absl::Status> statuses = OnRanks(
        ranks, [&](Communicator& world) { return Checkpoint::Open(world, directory_.path()).status(); });
    for (const absl::Status& status : statuses) {
      EXPECT_TRUE(absl::IsDataLoss(status)) << status;
      EXPECT_TRUE(absl::StrContains(status.message(), path)) << status;
      EXPECT_EQ(status, statuses[0]);
    }
  }
}

TEST_F(DamageTest, TheErrorNamesOtherStepsWhichAreTakenOnlyWhenAskedFor) {
  const std::string shard = step_ + "/shard-00000.safetensors";
  Overwrite(shard, "");
  EXPECT_TRUE(absl::EndsWith(Checkpoint::Open(directory_.path()).status().message(),
                             "; there is no other committed checkpoint beside it"));
  const Sample older(4);
  TemporaryDirectory other;
  Save(1, other.path(), older, 1);
  const std::string older_step = directory_.path() + "/step-00000004";
  ASSERT_TRUE(Rename(other.path() + "/step-00000004", older_step).ok());
  const absl::Status status = Checkpoint::Open(directory_.path()).status();
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
  EXPECT_TRUE(absl::EndsWith(status.message(),
                             "; other committed checkpoints, to be named in its place: " + older_step))
      << status;
  EXPECT_EQ(Checkpoint::Open(step_).status(), status);
  EXPECT_EQ(Checkpoint::Open(step_ + "/").status(), status);
  EXPECT_EQ(Difference(Checkpoint::Open(older_step), older), "");
}

// Well-formed lies: COMMIT agrees with the manifest, the manifest does not agree with the files.
class ForgeryTest : public DamageTest {
 protected:
  void ExpectRefused(const std::function<void(json&)>& forge, const std::string& message) {
    json manifest = json::parse(whole_, nullptr, false);
    forge(manifest);
    const std::string text = manifest.dump();
    Overwrite(step_ + "/manifest.json", text);
    Overwrite(step_ + "/COMMIT", Hex64(Hash64(text)) + "\n");
    const absl::Status status = Checkpoint::Open(directory_.path()).status();
    EXPECT_TRUE(absl::IsDataLoss(status)) << status << "\nexpected: " << message;
    EXPECT_TRUE(absl::StrContains(status.message(), message)) << status << "\nexpected: " << message;
  }

  const std::string whole_ = Contents(step_ + "/manifest.json");
};

TEST_F(ForgeryTest, TheManifestIsCheckedFieldByField) {
  ExpectRefused([](json& m) { m = json::array(); }, "manifest=an array: expected an object");
  ExpectRefused([](json& m) { m.erase("files"); }, "\"files\" is missing");
  ExpectRefused([](json& m) { m["more"] = 1; }, "unknown key \"more\"");
  ExpectRefused([](json& m) { m["format"] = "other"; }, "expected annulus-checkpoint version 1");
  ExpectRefused([](json& m) { m["version"] = 2; }, "version=2: expected annulus-checkpoint version 1");
  ExpectRefused([](json& m) { m["meta"]["step"] = -1; }, "meta.step=-1: expected an integer");
  ExpectRefused([](json& m) { m["meta"]["seed"] = 1.5; }, "meta.seed=1.5: expected an integer");
  ExpectRefused([](json& m) { m["meta"]["data_fingerprint"] = "12"; },
                "meta.data_fingerprint=\"12\": expected 16");
  ExpectRefused([](json& m) { m["meta"]["config"] = nullptr; }, "meta.config=null: expected a string");
  ExpectRefused([](json& m) { m["files"] = 3; }, "files=3: expected an array");
  ExpectRefused([](json& m) { m["files"][0]["bytes"] = uint64_t{1} << 63; },
                "files[0].bytes=9223372036854775808");
  ExpectRefused([](json& m) { m["files"][0]["hash"] = 7; },
                "files[0].hash=7: expected 16 hexadecimal digits");
  ExpectRefused([](json& m) { m["files"][1] = m["files"][0]; },
                "file shard-00000.safetensors is listed twice");
  for (const char* name : {"../shard-00000.safetensors", "/dev/zero", "shard-.safetensors", "", "COMMIT"})
    ExpectRefused([&](json& m) { m["files"][0]["name"] = name; },
                  absl::StrCat("files[0].name=\"", name, "\""));
}

TEST_F(ForgeryTest, FilesAndTensorsMustBeThoseOfTheManifest) {
  ExpectRefused([](json& m) { m["files"][0]["bytes"] = 10; }, "shard-00000.safetensors: ");
  ExpectRefused([](json& m) { m["files"][1]["hash"] = Hex64(1); }, "expected 0000000000000001 (manifest)");
  ExpectRefused([](json& m) { m["files"][0]["name"] = "shard-00007.safetensors"; },
                "shard-00007.safetensors: missing from this checkpoint");
  ExpectRefused([](json& m) { m["files"][0]["tensors"].erase(0); }, "(manifest)");
  ExpectRefused(
      [](json& m) { m["files"][0]["tensors"].push_back({{"name", "zz"}, {"dtype", "F32"}, {"shape", {2}}}); },
      "holds no tensor: expected \"zz\" F32 [2] (manifest)");
  ExpectRefused([](json& m) { m["files"][0]["tensors"][0]["shape"] = {1}; }, "(manifest)");
  ExpectRefused([](json& m) { m["files"][0]["tensors"][0]["dtype"] = "F16"; }, "dtype=F16 is not supported");
  ExpectRefused([](json& m) { m["files"][1]["tensors"].push_back(m["files"][0]["tensors"][0]); },
                "is in shard-00000.safetensors and in shard-00001.safetensors");
}

}  // namespace
}  // namespace annulus
