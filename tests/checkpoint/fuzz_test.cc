// Damaged and hostile bytes get a Status, never a crash. Deterministic: mutation i depends on i alone.

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>

#include "annulus/base/hash.h"
#include "checkpoint/checkpoint_testing.h"

namespace annulus {
namespace {

using nlohmann::json;
using testing::Contents;
using testing::Difference;
using testing::Overwrite;
using testing::Sample;
using testing::Save;
using testing::TemporaryDirectory;

// Random choices of one mutation.
class Dice {
 public:
  explicit Dice(uint64_t mutation) : random_(mutation, "mutation") {}
  size_t Below(size_t n) { return static_cast<size_t>(random_.Below(next_++, n)); }

 private:
  RandomStream random_;
  uint64_t next_ = 0;
};

// Bytes that mean something to the formats, and numbers around their limits.
const std::string& Token(Dice& dice) {
  static const auto* const tokens = new std::vector<std::string>{"{",
                                                                 "}",
                                                                 "[",
                                                                 "]",
                                                                 "\"",
                                                                 ":",
                                                                 ",",
                                                                 "0",
                                                                 "1",
                                                                 "-1",
                                                                 "4",
                                                                 "1e9",
                                                                 "1.5",
                                                                 "9223372036854775807",
                                                                 "9223372036854775808",
                                                                 "18446744073709551615",
                                                                 "99999999999999999999",
                                                                 "4294967296",
                                                                 "null",
                                                                 "true",
                                                                 "\"F32\"",
                                                                 "\"F64\"",
                                                                 "\"BF16\"",
                                                                 "\"dtype\"",
                                                                 "\"shape\"",
                                                                 "\"data_offsets\"",
                                                                 "\"__metadata__\"",
                                                                 "{}",
                                                                 "[]",
                                                                 "\\u0000",
                                                                 "\\ud800",
                                                                 "\xff",
                                                                 "\xc3",
                                                                 std::string(1, '\0'),
                                                                 std::string(64, '['),
                                                                 "[[[[[[[[",
                                                                 " ",
                                                                 "shard-00000.safetensors",
                                                                 "../",
                                                                 "0000000000000000"};
  return (*tokens)[dice.Below(tokens->size())];
}

std::string Mutated(std::string text, Dice& dice) {
  const size_t edits = 1 + dice.Below(3);
  for (size_t i = 0; i < edits; ++i) {
    const size_t at = dice.Below(text.size() + 1), length = std::min(dice.Below(12), text.size() - at);
    switch (dice.Below(6)) {
      case 0:
        if (at < text.size()) text[at] = static_cast<char>(text[at] ^ (1 << dice.Below(8)));
        break;
      case 1:
        text.erase(at, length);
        break;
      case 2:
        text.insert(at, Token(dice));
        break;
      case 3:
        text.replace(at, length, Token(dice));
        break;
      case 4:
        text.insert(dice.Below(text.size() + 1), text.substr(at, 4 * length));
        break;
      default:
        text.resize(at);
        break;
    }
  }
  return text;
}

// Replaces, removes or copies one value somewhere in the tree: stays JSON, so that later checks are reached.
void MutateTree(json& tree, Dice& dice) {
  json* at = &tree;
  while (at->is_structured() && !at->empty() && dice.Below(5) > 0) {
    auto child = at->begin();
    std::advance(child, dice.Below(at->size()));
    at = &*child;
  }
  switch (dice.Below(4)) {
    case 0: {
      const json value = json::parse(Token(dice), nullptr, false);
      if (!value.is_discarded()) *at = value;
      break;
    }
    case 1:
      if (at->is_number_unsigned()) *at = at->get<uint64_t>() + dice.Below(3) - 1;
      break;
    case 2:
      if (at->is_array() && !at->empty()) at->push_back((*at)[dice.Below(at->size())]);
      break;
    default:
      if (at->is_structured() && !at->empty()) {
        auto child = at->begin();
        std::advance(child, dice.Below(at->size()));
        at->erase(child);
      }
      break;
  }
}

std::string FileOf(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  std::string file(sizeof(length), '\0');
  std::memcpy(file.data(), &length, sizeof(length));
  return file + header + data;
}

struct Parts {
  std::string header, data;
};

Parts Split(const std::string& file) {
  uint64_t length = 0;
  std::memcpy(&length, file.data(), sizeof(length));
  return {file.substr(8, length), file.substr(8 + length)};
}

// Reads every byte of every tensor, so that a sanitizer sees a range that is not inside the file.
uint64_t Touch(const ConstTensorRef& tensor) {
  return Hash64(tensor.raw(), static_cast<size_t>(tensor.bytes()));
}

struct Tally {
  int accepted = 0, refused = 0;
};

void ParseExactly(const std::string& file, Tally& tally) {
  // A block of exactly this size: reading past its end is an error that sanitizers see.
  const std::unique_ptr<uint8_t[]> bytes(new uint8_t[file.size()]);
  std::memcpy(bytes.get(), file.data(), file.size());
  const absl::StatusOr<SafetensorsFile> parsed = SafetensorsFile::Parse("f", {bytes.get(), file.size()});
  ++(parsed.ok() ? tally.accepted : tally.refused);
  if (!parsed.ok()) {
    EXPECT_TRUE(absl::IsInvalidArgument(parsed.status())) << parsed.status();
    return;
  }
  uint64_t data_bytes = 0;
  for (const NamedTensor& t : parsed->tensors()) {
    Touch(t.tensor);
    data_bytes += static_cast<uint64_t>(t.tensor.bytes());
  }
  EXPECT_EQ(Split(file).data.size(), data_bytes);  // no hole and no overlap
}

TEST(FuzzSafetensors, HeadersAndLengths) {
  const TemporaryDirectory directory;
  const std::string path = directory.path() + "/f";
  ASSERT_TRUE(WriteSafetensors(path, Sample(1).tensors(), {{"k", "v"}}).ok());
  const std::string whole = Contents(path);
  const Parts parts = Split(whole);
  Tally tally;
  ParseExactly(whole, tally);
  ASSERT_EQ(tally.accepted, 1);

  for (uint64_t i = 0; i < 1500; ++i) {
    Dice dice(i);
    if (i % 3 == 0) {
      ParseExactly(Mutated(whole, dice), tally);
    } else if (i % 3 == 1) {
      ParseExactly(FileOf(Mutated(parts.header, dice), parts.data), tally);
    } else {
      json header = json::parse(parts.header, nullptr, false);
      MutateTree(header, dice);
      ParseExactly(FileOf(header.dump(), parts.data), tally);
    }
  }
  EXPECT_EQ(tally.accepted + tally.refused, 1501);
  EXPECT_GT(tally.refused, 1000);
  EXPECT_GT(tally.accepted, 20);  // mutations of names, metadata and data bytes are valid files
}

class FuzzCheckpoint : public ::testing::Test {
 protected:
  FuzzCheckpoint() {
    Save(2, directory_.path(), sample_, 1);
    for (const char* file : {"COMMIT", "manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"})
      whole_[file] = Contents(Path(file));
  }
  std::string Path(const std::string& file) const { return directory_.path() + "/step-00000009/" + file; }

  absl::StatusOr<Checkpoint> Open() {
    absl::StatusOr<Checkpoint> opened = Checkpoint::Open(directory_.path());
    if (!opened.ok()) {
      EXPECT_TRUE(absl::IsDataLoss(opened.status())) << opened.status();
      return opened;
    }
    for (const std::string& name : opened->tensor_names()) Touch(opened->Find(name).value());
    return opened;
  }

  const Sample sample_ = Sample(9);
  TemporaryDirectory directory_;
  std::map<std::string, std::string> whole_;
};

TEST_F(FuzzCheckpoint, AnyChangeOfAnyFileIsRefused) {
  for (uint64_t i = 0; i < 400; ++i) {
    Dice dice(i);
    auto file = whole_.begin();
    std::advance(file, i % whole_.size());
    const std::string mutated = Mutated(file->second, dice);
    Overwrite(Path(file->first), mutated);
    const absl::StatusOr<Checkpoint> opened = Open();
    EXPECT_EQ(opened.ok(), mutated == file->second) << i;
    Overwrite(Path(file->first), file->second);
  }
  EXPECT_EQ(Difference(Open(), sample_), "");
}

// The same with hashes, sizes and COMMIT made right again: what parsing and cross-checks alone must survive.
TEST_F(FuzzCheckpoint, ForgedManifests) {
  int refused = 0;
  for (uint64_t i = 0; i < 500; ++i) {
    Dice dice(i);
    std::string text = whole_["manifest.json"];
    if (i % 2 == 0) {
      text = Mutated(text, dice);
    } else {
      json manifest = json::parse(text, nullptr, false);
      MutateTree(manifest, dice);
      text = manifest.dump();
    }
    Overwrite(Path("manifest.json"), text);
    Overwrite(Path("COMMIT"), Hex64(Hash64(text)) + "\n");
    refused += !Open().ok();
  }
  EXPECT_GT(refused, 250);
}

TEST_F(FuzzCheckpoint, ForgedShards) {
  const Parts parts = Split(whole_["shard-00000.safetensors"]);
  int refused = 0;
  for (uint64_t i = 0; i < 300; ++i) {
    Dice dice(i);
    const std::string shard = FileOf(Mutated(parts.header, dice), parts.data);
    json manifest = json::parse(whole_["manifest.json"], nullptr, false);
    manifest["files"][0]["bytes"] = shard.size();
    manifest["files"][0]["hash"] = Hex64(Hash64(shard));
    const std::string text = manifest.dump();
    Overwrite(Path("shard-00000.safetensors"), shard);
    Overwrite(Path("manifest.json"), text);
    Overwrite(Path("COMMIT"), Hex64(Hash64(text)) + "\n");
    refused += !Open().ok();
  }
  EXPECT_GT(refused, 200);
}

}  // namespace
}  // namespace annulus
