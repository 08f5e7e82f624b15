#pragma once

// Writes token files of every format for the tests of the data layer.

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "annulus/base/check.h"
#include "annulus/base/file.h"
#include "annulus/train/data.h"

namespace annulus {

// The folder of this process, removed after the last test.
inline std::string TestFolder() { return absl::StrCat(testing::TempDir(), "annulus-data-", getpid(), "/"); }

class TestFolderEnvironment : public testing::Environment {
 public:
  void SetUp() override { ANNULUS_CHECK_OK(MakeDirectories(TestFolder())); }
  void TearDown() override { ANNULUS_CHECK_OK(RemoveAll(TestFolder())); }
};
inline const testing::Environment* const kTestFolderEnvironment =
    testing::AddGlobalTestEnvironment(new TestFolderEnvironment);

inline std::string TestPath(const std::string& name) { return TestFolder() + name; }

inline void WriteTestFile(const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  ANNULUS_CHECK(!file.fail()) << "cannot write " << path;
}

template <typename T>
void Append(std::string* bytes, T value) {
  bytes->append(reinterpret_cast<const char*>(&value), sizeof(T));
}

template <typename T>
std::string Packed(const std::vector<int64_t>& values) {
  std::string bytes;
  for (const int64_t value : values) Append(&bytes, static_cast<T>(value));
  return bytes;
}

// The contents of a Megatron index, right or wrong.
struct MegatronIndex {
  std::string magic = std::string("MMIDIDX\0\0", 9);
  uint64_t version = 1;
  uint8_t dtype = 8;
  std::vector<int64_t> lengths = {};
  std::vector<int64_t> offsets = {};
  std::vector<int64_t> boundaries = {};
  std::string modes = {};

  std::string Bytes() const {
    std::string bytes = magic;
    Append(&bytes, version);
    Append(&bytes, dtype);
    Append(&bytes, static_cast<uint64_t>(lengths.size()));
    Append(&bytes, static_cast<uint64_t>(boundaries.size()));
    return bytes + Packed<int32_t>(lengths) + Packed<int64_t>(offsets) + Packed<int64_t>(boundaries) + modes;
  }
};

inline std::string LlmCBytes(const std::vector<int64_t>& tokens, int64_t width) {
  std::string bytes;
  Append<int32_t>(&bytes, width == 2 ? 20240520 : 20240801);
  Append<int32_t>(&bytes, width == 2 ? 1 : 7);
  Append<int32_t>(&bytes, static_cast<int32_t>(tokens.size()));
  bytes.resize(1024);
  return bytes + (width == 2 ? Packed<uint16_t>(tokens) : Packed<uint32_t>(tokens));
}

inline std::vector<int64_t> Range(int64_t begin, int64_t end) {
  std::vector<int64_t> values(static_cast<size_t>(end - begin));
  std::iota(values.begin(), values.end(), begin);
  return values;
}

inline SourceSpec SourceAt(SourceFormat format, const std::string& path) {
  SourceSpec source;
  source.format = format;
  source.path = path;
  return source;
}

inline DataSpec SpecOf(const std::vector<SourceSpec>& train, int64_t seq_len) {
  DataSpec spec;
  spec.train = train;
  spec.seq_len = seq_len;
  return spec;
}

inline SourceSpec LlmCSource(const std::string& name, const std::vector<int64_t>& tokens) {
  const std::string path = TestPath(name);
  WriteTestFile(path, LlmCBytes(tokens, 4));
  return SourceAt(SourceFormat::kLlmC, path);
}

// An llm.c source whose tokens are begin, begin + 1, ..., end - 1: a token tells its position.
inline SourceSpec CountingSource(const std::string& name, int64_t begin, int64_t end) {
  return LlmCSource(name, Range(begin, end));
}

// A Megatron source of the same kind with the given document lengths, one sequence a document.
inline SourceSpec CountingDocuments(const std::string& name, const std::vector<int64_t>& lengths) {
  MegatronIndex index{.dtype = 4};
  index.lengths = lengths;
  int64_t tokens = 0;
  for (const int64_t length : lengths) {
    index.offsets.push_back(4 * tokens);
    tokens += length;
  }
  index.boundaries = Range(0, static_cast<int64_t>(lengths.size()) + 1);
  const std::string path = TestPath(name);
  WriteTestFile(path + ".idx", index.Bytes());
  WriteTestFile(path + ".bin", Packed<int32_t>(Range(0, tokens)));
  return SourceAt(SourceFormat::kMegatron, path);
}

inline SourceSpec TextSource(const std::string& name, const std::string& text) {
  const std::string path = TestPath(name);
  WriteTestFile(path, text);
  return SourceAt(SourceFormat::kText, path);
}

inline testing::AssertionResult Contains(absl::string_view text, absl::string_view part) {
  if (absl::StrContains(text, part)) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "\"" << text << "\" lacks \"" << part << "\"";
}

inline constexpr int64_t kTestVocab = 1 << 20;

inline std::unique_ptr<DataSet> OpenOrDie(const DataSpec& spec, uint64_t seed = 1,
                                          int64_t vocab_size = kTestVocab) {
  auto data = DataSet::Open(spec, seed, vocab_size);
  ANNULUS_CHECK_OK(data.status());
  return std::move(data).value();
}

inline Sequence TrainOrDie(const DataSet& data, int64_t n) {
  auto sequence = data.Train(n);
  ANNULUS_CHECK_OK(sequence.status());
  return std::move(sequence).value();
}

inline Sequence ValidationOrDie(const DataSet& data, int64_t n) {
  auto sequence = data.Validation(n);
  ANNULUS_CHECK_OK(sequence.status());
  return std::move(sequence).value();
}

}  // namespace annulus
