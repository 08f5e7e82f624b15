// Token files: what is written is read, for every format and type; 64-bit offsets; every bad header has a
// message that names file, field, value and expectation.

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <functional>

#include "token_files.h"

namespace annulus {
namespace {

constexpr int64_t kWhole = 1000;  // longer than any small file here: one packed sequence holds everything
constexpr int64_t kLargestVocab = INT32_MAX;

DataSpec WholeFile(const SourceSpec& source) {
  DataSpec spec = SpecOf({source}, kWhole);
  spec.packing = Packing::kDocuments;
  return spec;
}

std::vector<int64_t> AllTokens(const SourceSpec& source) {
  const Sequence sequence = TrainOrDie(*OpenOrDie(WholeFile(source), 1, kLargestVocab), 0);
  EXPECT_LT(sequence.length, kWhole);
  return {sequence.tokens.begin(), sequence.tokens.begin() + sequence.length};
}

// Positions at which documents start, as a masked read of the whole file shows them.
std::vector<int64_t> DocumentStarts(const SourceSpec& source) {
  DataSpec spec = WholeFile(source);
  spec.document_mask = true;
  const Sequence sequence = TrainOrDie(*OpenOrDie(spec, 1, kLargestVocab), 0);
  std::vector<int64_t> starts(sequence.document_starts.begin(),
                              sequence.document_starts.begin() + sequence.length);
  starts.erase(std::unique(starts.begin(), starts.end()), starts.end());
  return starts;
}

absl::Status OpenStatus(const DataSpec& spec) { return DataSet::Open(spec, 1, kTestVocab).status(); }

TEST(TextFormat, EveryByteIsAToken) {
  std::string text;
  for (int i = 0; i < 256; ++i) text.push_back(static_cast<char>(i));
  EXPECT_EQ(AllTokens(TextSource("t", text)), Range(0, 256));
}

TEST(TextFormat, DocumentsEndAfterTheSeparator) {
  const auto starts = [](const std::string& separator, const std::string& text) {
    SourceSpec source = TextSource("t", text);
    source.document_separator = separator;
    return DocumentStarts(source);
  };
  using V = std::vector<int64_t>;
  EXPECT_EQ(starts("", "ab\n\ncd"), V({0}));
  EXPECT_EQ(starts("\n\n", "ab\n\ncd\n\nef"), V({0, 4, 8}));
  EXPECT_EQ(starts("\n\n", "ab\n\ncd\n\n"), V({0, 4}));               // nothing after the last one
  EXPECT_EQ(starts("\n\n", "\n\n\nab\n\n\n\n\nc"), V({0, 2, 7, 9}));  // occurrences do not overlap
  EXPECT_EQ(starts(std::string("\0", 1), std::string("a\0b", 3)), V({0, 2}));
}

struct DtypeCase {
  uint8_t code;
  int64_t largest;
  std::function<std::string(const std::vector<int64_t>&)> pack;
};

TEST(MegatronFormat, RoundTripOfEveryIntegerType) {
  const DtypeCase cases[] = {
      {1, 255, Packed<uint8_t>},           {2, 127, Packed<int8_t>},
      {3, 32767, Packed<int16_t>},         {4, (1 << 30) + 1, Packed<int32_t>},
      {5, (1 << 30) + 1, Packed<int64_t>}, {8, 65535, Packed<uint16_t>},
  };
  for (const DtypeCase& c : cases) {
    SCOPED_TRACE(absl::StrCat("dtype ", c.code));
    const std::vector<int64_t> tokens = {0, 1, c.largest, 7, c.largest - 1, 2, 3};
    const int64_t width = static_cast<int64_t>(c.pack({0}).size());
    const SourceSpec source = SourceAt(SourceFormat::kMegatron, TestPath("p"));
    WriteTestFile(source.path + ".bin", c.pack(tokens));
    MegatronIndex index{
        .dtype = c.code, .lengths = {3, 4}, .offsets = {0, 3 * width}, .boundaries = {0, 1, 2}};
    for (const std::string modes : {"", "\1\2"}) {
      index.modes = modes;
      WriteTestFile(source.path + ".idx", index.Bytes());
      EXPECT_EQ(AllTokens(source), tokens);
      EXPECT_EQ(DocumentStarts(source), std::vector<int64_t>({0, 3}));
    }
  }
}

TEST(MegatronFormat, SequencesAreReadByTheirOffsets) {
  // In the file: one byte of nothing, sequence 3, a gap, sequence 0, sequence 2 again inside sequence 0.
  const SourceSpec source = SourceAt(SourceFormat::kMegatron, TestPath("p"));
  std::string bin = "x";
  bin += Packed<uint16_t>({70, 71});
  bin += "gap";
  const int64_t third = static_cast<int64_t>(bin.size());
  bin += Packed<uint16_t>({10, 11, 12, 13});
  WriteTestFile(source.path + ".bin", bin);
  MegatronIndex index{
      .lengths = {4, 0, 2, 2, 0}, .offsets = {third, 0, third + 2, 1, 0}, .boundaries = {0, 1, 1, 2, 4, 5}};
  WriteTestFile(source.path + ".idx", index.Bytes());
  EXPECT_EQ(AllTokens(source), std::vector<int64_t>({10, 11, 12, 13, 11, 12, 70, 71}));
  EXPECT_EQ(DocumentStarts(source), std::vector<int64_t>({0, 4}));  // empty documents vanish

  // Reads that begin and end inside sequences, and across an empty one.
  const std::unique_ptr<DataSet> data = OpenOrDie(SpecOf({source}, 2));
  for (int64_t n = 0; n < 40; ++n) {
    const Sequence s = TrainOrDie(*data, n);
    const std::vector<int64_t> all = {10, 11, 12, 13, 11, 12, 70, 71};
    const std::vector<int64_t> got = {s.tokens[0], s.tokens[1], s.targets[1]};
    EXPECT_NE(std::search(all.begin(), all.end(), got.begin(), got.end()), all.end());
  }
}

TEST(LlmCFormat, RoundTripOfBothVersions) {
  for (const int64_t width : {2, 4}) {
    const std::vector<int64_t> tokens = {0, 1, width == 2 ? 65535 : 128000, 5, 4};
    const SourceSpec source = SourceAt(SourceFormat::kLlmC, TestPath("p"));
    WriteTestFile(source.path, LlmCBytes(tokens, width));
    EXPECT_EQ(AllTokens(source), tokens) << width;
  }
}

TEST(LlmCFormat, DocumentsStartAtTheStartToken) {
  SourceSpec source = LlmCSource("p", {9, 1, 2, 9, 9, 3});
  EXPECT_EQ(DocumentStarts(source), std::vector<int64_t>({0}));
  source.document_start_token = 9;
  EXPECT_EQ(DocumentStarts(source), std::vector<int64_t>({0, 3, 4}));
  source.document_start_token = 2;  // the first document need not begin with it
  EXPECT_EQ(DocumentStarts(source), std::vector<int64_t>({0, 2}));
}

TEST(LlmCFormat, DocumentScanSeesEveryToken) {
  // Starts on both sides of multiples of 65,536, where a scan in pieces could lose or repeat one.
  std::vector<int64_t> tokens(200000, 1);
  const std::vector<int64_t> starts = {65535, 65536, 65537, 131072, 131073, 199999};
  for (const int64_t start : starts) tokens[static_cast<size_t>(start)] = 5;
  SourceSpec source = LlmCSource("p", tokens);
  source.document_start_token = 5;
  DataSpec spec = WholeFile(source);
  spec.seq_len = 300000;
  spec.document_mask = true;
  const Sequence sequence = TrainOrDie(*OpenOrDie(spec), 0);
  std::vector<int64_t> found;
  for (int64_t i = 1; i < sequence.length; ++i) {
    if (sequence.document_starts[static_cast<size_t>(i)] == i) found.push_back(i);
  }
  EXPECT_EQ(found, starts);
}

// Creates a file of `bytes` bytes that takes no space, with `tail` at its end.
void WriteSparse(const std::string& path, int64_t bytes, const std::string& tail) {
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600);
  ASSERT_GE(fd, 0);
  ASSERT_EQ(ftruncate(fd, bytes), 0);
  ASSERT_EQ(pwrite(fd, tail.data(), tail.size(), bytes - static_cast<int64_t>(tail.size())),
            static_cast<ssize_t>(tail.size()));
  close(fd);
}

TEST(LargeFiles, MegatronOffsetsPast4GiB) {
  const SourceSpec source = SourceAt(SourceFormat::kMegatron, TestPath("p"));
  const int64_t bytes = (int64_t{1} << 32) + 4096 + 3;
  const std::vector<int64_t> tokens = {500, 501, 502, 503};
  WriteSparse(source.path + ".bin", bytes, Packed<uint16_t>(tokens));
  WriteTestFile(source.path + ".idx",
                MegatronIndex{.lengths = {2, 4}, .offsets = {0, bytes - 8}, .boundaries = {0, 2}}.Bytes());
  EXPECT_EQ(AllTokens(source), std::vector<int64_t>({0, 0, 500, 501, 502, 503}));
  // The same as the only sequence: no table of positions is kept then.
  WriteTestFile(source.path + ".idx",
                MegatronIndex{.lengths = {4}, .offsets = {bytes - 8}, .boundaries = {0, 1}}.Bytes());
  EXPECT_EQ(AllTokens(source), tokens);
  WriteTestFile(source.path + ".idx",
                MegatronIndex{.lengths = {4}, .offsets = {bytes - 7}, .boundaries = {0, 1}}.Bytes());
  EXPECT_TRUE(Contains(OpenStatus(WholeFile(source)).message(), absl::StrCat("offset[0]=", bytes - 7)));
}

TEST(LargeFiles, TextPositionsPast4GiB) {
  const SourceSpec source = SourceAt(SourceFormat::kText, TestPath("p"));
  const int64_t bytes = int64_t{5} << 30;
  std::string tail;
  for (int i = 1; i <= 33; ++i) tail.push_back(static_cast<char>(i));
  WriteSparse(source.path, bytes, tail);
  DataSpec spec = SpecOf({source}, 32);
  spec.validation_fraction = 33.0 / static_cast<double>(bytes);
  const std::unique_ptr<DataSet> data = OpenOrDie(spec, 1, 256);
  ASSERT_EQ(data->validation_sequences(), 1);
  EXPECT_EQ(data->train_tokens() + data->validation_tokens(), bytes);
  const Sequence sequence = ValidationOrDie(*data, 0);
  for (size_t i = 0; i < 32; ++i) {
    EXPECT_EQ(sequence.tokens[i], static_cast<int32_t>(i) + 1);
    EXPECT_EQ(sequence.targets[i], static_cast<int32_t>(i) + 2);
  }
}

TEST(BadFiles, MissingOnesAreNamed) {
  const SourceSpec megatron = SourceAt(SourceFormat::kMegatron, TestPath("none"));
  EXPECT_TRUE(absl::IsNotFound(OpenStatus(WholeFile(megatron))));
  EXPECT_TRUE(Contains(OpenStatus(WholeFile(megatron)).message(), megatron.path + ".idx: open"));
  WriteTestFile(megatron.path + ".idx", MegatronIndex{.boundaries = {0}}.Bytes());
  EXPECT_TRUE(Contains(OpenStatus(WholeFile(megatron)).message(), megatron.path + ".bin: open"));
  const SourceSpec text = SourceAt(SourceFormat::kText, TestPath("text"));
  EXPECT_TRUE(Contains(OpenStatus(WholeFile(text)).message(), text.path + ": open"));
  EXPECT_TRUE(Contains(OpenStatus(WholeFile(SourceAt(SourceFormat::kText, testing::TempDir()))).message(),
                       "regular file"));
}

TEST(BadFiles, MegatronIndexErrorsNameTheField) {
  const SourceSpec source = SourceAt(SourceFormat::kMegatron, TestPath("p"));
  WriteTestFile(source.path + ".bin", Packed<uint16_t>(Range(0, 10)));
  const MegatronIndex good{.lengths = {4, 6}, .offsets = {0, 8}, .boundaries = {0, 1, 2}};
  const auto error = [&](const std::string& bytes) {
    WriteTestFile(source.path + ".idx", bytes);
    const absl::Status status = OpenStatus(WholeFile(source));
    EXPECT_TRUE(status.ok() || absl::StartsWith(status.message(), source.path + ".idx: ")) << status;
    return std::string(status.message());
  };
  const auto changed = [&](const std::function<void(MegatronIndex&)>& change) {
    MegatronIndex index = good;
    change(index);
    return error(index.Bytes());
  };
  // `count` at the header's byte `at`, the arrays left as they are.
  const auto with_count = [&](size_t at, uint64_t count) {
    std::string bytes = good.Bytes();
    std::memcpy(&bytes[at], &count, sizeof(count));
    return error(bytes);
  };
  EXPECT_EQ(error(good.Bytes()), "");
  EXPECT_TRUE(Contains(error(""), "bytes=0: expected at least the header of 34"));
  EXPECT_TRUE(Contains(error(good.Bytes().substr(0, 33)), "bytes=33: expected at least the header of 34"));
  EXPECT_TRUE(Contains(changed([](auto& i) { i.magic[3] = 'X'; }), "magic=MMIXIDX"));
  EXPECT_TRUE(Contains(changed([](auto& i) { i.version = 2; }), "version=2: expected 1"));
  EXPECT_TRUE(Contains(changed([](auto& i) { i.dtype = 0; }), "dtype=0: expected 1 (u8)"));
  EXPECT_TRUE(Contains(changed([](auto& i) { i.dtype = 7; }), "cannot be floating-point"));
  EXPECT_TRUE(Contains(with_count(18, 100), "sequences=100: expected at most 4"));
  // 12 * S and 8 * D would wrap around 2^64 to the right sizes.
  EXPECT_TRUE(Contains(with_count(18, 2 + (uint64_t{1} << 62)), "sequences=4611686018427387906: expected"));
  EXPECT_TRUE(Contains(with_count(26, 3 + (uint64_t{1} << 61)), "document_boundaries=2305843009213693955"));
  EXPECT_TRUE(Contains(with_count(26, 0), "document_boundaries=0: expected 1 to 3"));
  EXPECT_TRUE(Contains(with_count(26, 4), "document_boundaries=4: expected 1 to 3"));
  EXPECT_TRUE(Contains(error(good.Bytes().substr(0, 60)), "document_boundaries=3: expected 1 to 0"));
  EXPECT_TRUE(Contains(error(good.Bytes() + "x"), "bytes=83: expected 82, or 84 with modes"));
  EXPECT_TRUE(Contains(changed([](auto& i) { i.lengths[1] = -6; }), "length[1]=-6: expected at least 0"));
  EXPECT_TRUE(Contains(changed([](auto& i) { i.lengths[1] = 7; }),
                       "offset[1]=8: expected 14 bytes from there inside the 20 of " + source.path + ".bin"));
  EXPECT_TRUE(Contains(changed([](auto& i) { i.offsets[0] = -1; }), "offset[0]=-1"));
  EXPECT_TRUE(Contains(changed([](auto& i) { i.offsets[0] = INT64_MAX; }), "offset[0]=9223372036854775807"));
  EXPECT_TRUE(Contains(changed([](auto& i) {
                         i.boundaries = {1, 1, 2};
                       }),
                       "document_boundary[0]=1: expected 0"));
  EXPECT_TRUE(Contains(changed([](auto& i) {
                         i.boundaries = {0, 3, 2};
                       }),
                       "document_boundary[1]=3: expected 0 to 2"));
  EXPECT_TRUE(Contains(changed([](auto& i) {
                         i.boundaries = {0, 2, 1};
                       }),
                       "document_boundary[2]=1: expected 2 to 2"));
  EXPECT_TRUE(Contains(changed([](auto& i) {
                         i.boundaries = {0, 1, 1};
                       }),
                       "document_boundary[2]=1: expected the number of sequences, 2"));
}

TEST(BadFiles, LlmCHeaderErrorsNameTheField) {
  const SourceSpec source = SourceAt(SourceFormat::kLlmC, TestPath("p"));
  const auto error = [&](int32_t magic, int32_t version, int32_t tokens, size_t bytes) {
    std::string contents;
    Append(&contents, magic);
    Append(&contents, version);
    Append(&contents, tokens);
    contents.resize(bytes);
    WriteTestFile(source.path, contents);
    const absl::Status status = OpenStatus(WholeFile(source));
    EXPECT_TRUE(status.ok() || absl::StartsWith(status.message(), source.path + ": ")) << status;
    return std::string(status.message());
  };
  EXPECT_EQ(error(20240520, 1, 8, 1040), "");
  EXPECT_EQ(error(20240801, 7, 4, 1040), "");
  EXPECT_TRUE(Contains(error(20240520, 1, 8, 1023), "bytes=1023: expected at least the header of 1024"));
  EXPECT_TRUE(Contains(error(20240521, 1, 8, 1040), "magic=20240521: expected 20240520 or 20240801"));
  EXPECT_TRUE(Contains(error(20240520, 7, 8, 1040), "version=7: expected 1 for magic 20240520"));
  EXPECT_TRUE(Contains(error(20240801, 1, 4, 1040), "version=1: expected 7 for magic 20240801"));
  EXPECT_TRUE(Contains(error(20240520, 1, 8, 1039),
                       "tokens=8: expected a file of 1040 bytes (1024 and 2 a token), it has 1039"));
  EXPECT_TRUE(Contains(error(20240520, 1, 8, 1041),
                       "tokens=8: expected a file of 1040 bytes (1024 and 2 a token), it has 1041"));
  EXPECT_TRUE(Contains(error(20240520, 1, -1, 1040), "tokens=-1: expected at least 0"));
  EXPECT_TRUE(Contains(error(20240520, 1, INT32_MAX, 1040),
                       "tokens=2147483647: expected a file of 4294968318 bytes"));
}

TEST(Vocabulary, TokensOutsideAreNamedWithTheirPosition) {
  std::vector<int64_t> tokens(20, 3);
  tokens[13] = 50;
  SourceSpec source = LlmCSource("p", tokens);
  DataSpec spec = WholeFile(source);
  EXPECT_TRUE(OpenOrDie(spec, 1, 51)->Train(0).ok());
  absl::Status status = OpenOrDie(spec, 1, 50)->Train(0).status();
  EXPECT_TRUE(absl::IsOutOfRange(status));
  EXPECT_EQ(status.message(), source.path + ": token[13]=50: expected 0 to 49, as the vocabulary has 50");

  // Every window that holds it as a token or only as its last target is refused, and no other.
  spec.packing = Packing::kStream;
  spec.seq_len = 4;
  const std::unique_ptr<DataSet> strict = OpenOrDie(spec, 1, 50), lenient = OpenOrDie(spec, 1, 51);
  int refused = 0, only_target = 0;
  for (int64_t n = 0; n < 60; ++n) {
    const Sequence s = TrainOrDie(*lenient, n);
    const bool as_token = std::count(s.tokens.begin(), s.tokens.end(), 50) > 0;
    const bool as_target = s.targets.back() == 50;
    EXPECT_EQ(absl::IsOutOfRange(strict->Train(n).status()), as_token || as_target) << n;
    refused += as_token || as_target;
    only_target += as_target && !as_token;
  }
  EXPECT_GT(refused, 0);
  EXPECT_LT(refused, 60);
  EXPECT_GT(only_target, 0);

  // Tokens that do not even fit into the 32 bits of a sequence.
  source = SourceAt(SourceFormat::kMegatron, TestPath("m"));
  for (const int64_t token : {int64_t{-1}, int64_t{1} << 32, INT64_MIN}) {
    WriteTestFile(source.path + ".bin", Packed<int64_t>({1, 2, token}));
    WriteTestFile(source.path + ".idx",
                  MegatronIndex{.dtype = 5, .lengths = {3}, .offsets = {0}, .boundaries = {0, 1}}.Bytes());
    status = OpenOrDie(WholeFile(source))->Train(0).status();
    EXPECT_TRUE(Contains(status.message(), absl::StrCat(source.path, ".bin: token[2]=", token, ":")));
  }
}

}  // namespace
}  // namespace annulus
