#include "annulus/train/safetensors.h"

#include <gtest/gtest.h>

#include <cstring>

#include "absl/strings/match.h"
#include "checkpoint/checkpoint_testing.h"

namespace annulus {
namespace {

using testing::Contents;
using testing::Overwrite;
using testing::Sample;
using testing::TemporaryDirectory;

std::string FileOf(absl::string_view header, absl::string_view data = "") {
  const uint64_t length = header.size();
  std::string file(sizeof(length), '\0');
  std::memcpy(file.data(), &length, sizeof(length));
  return absl::StrCat(file, header, data);
}

absl::StatusOr<SafetensorsFile> ParseText(const std::string& file) {
  return SafetensorsFile::Parse(
      "f", absl::Span<const uint8_t>(reinterpret_cast<const uint8_t*>(file.data()), file.size()));
}

TEST(WriteSafetensors, LaysOutLikeOtherWriters) {
  const float single[2] = {1.5f, -2.0f};
  const double wide = 0.25;
  const int64_t number = 7;
  const uint8_t bytes[3] = {'a', 'b', 'c'};
  const TemporaryDirectory directory;
  const std::string path = directory.path() + "/f";
  const absl::StatusOr<WrittenFile> written =
      WriteSafetensors(path,
                       {{"u", {bytes, DType::kU8, Device{}, Shape({3})}},
                        {"b", {single, DType::kF32, Device{}, Shape({2, 1})}},
                        {"none", {nullptr, DType::kF32, Device{}, Shape({0})}},
                        {"z", {&wide, DType::kF64, Device{}, Shape()}},
                        {"a", {&number, DType::kI64, Device{}, Shape({1})}}},
                       {{"k", "v\n"}});
  ASSERT_TRUE(written.ok()) << written.status();

  std::string header = R"({"__metadata__":{"k":"v\n"},)"
                       R"("a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
                       R"("z":{"dtype":"F64","shape":[],"data_offsets":[8,16]},)"
                       R"("b":{"dtype":"F32","shape":[2,1],"data_offsets":[16,24]},)"
                       R"("none":{"dtype":"F32","shape":[0],"data_offsets":[24,24]},)"
                       R"("u":{"dtype":"U8","shape":[3],"data_offsets":[24,27]}})";
  while (header.size() % 8 != 0) header += ' ';
  std::string data(27, '\0');
  std::memcpy(&data[0], &number, 8);
  std::memcpy(&data[8], &wide, 8);
  std::memcpy(&data[16], single, 8);
  std::memcpy(&data[24], bytes, 3);
  const std::string expected = FileOf(header, data);
  EXPECT_EQ(Contents(path), expected);
  EXPECT_EQ(written->bytes, static_cast<int64_t>(expected.size()));
  EXPECT_EQ(written->hash, Hash64(expected));
}

TEST(WriteSafetensors, ReadsBackBitForBitAndSurvivesMoves) {
  const TemporaryDirectory directory;
  const std::string path = directory.path() + "/f";
  const Sample sample(1);
  ASSERT_TRUE(WriteSafetensors(path, sample.tensors(), {{"format", "pt"}}).ok());
  absl::StatusOr<SafetensorsFile> opened = SafetensorsFile::Open(path);
  ASSERT_TRUE(opened.ok()) << opened.status();
  std::vector<SafetensorsFile> moved;
  moved.push_back(*std::move(opened));
  moved.reserve(moved.capacity() + 1);  // moves it again
  const SafetensorsFile& file = moved[0];

  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"format", "pt"}}));
  EXPECT_EQ(file.bytes().size(), Contents(path).size());
  ASSERT_EQ(file.tensors().size(), sample.tensors().size());
  for (size_t i = 1; i < file.tensors().size(); ++i)
    EXPECT_LT(file.tensors()[i - 1].name, file.tensors()[i].name);
  for (const NamedTensor& t : sample.tensors()) {
    const absl::StatusOr<ConstTensorRef> found = file.Find(t.name);
    ASSERT_TRUE(found.ok()) << found.status();
    EXPECT_EQ(found->dtype(), t.tensor.dtype());
    EXPECT_EQ(found->shape(), t.tensor.shape());
    if (t.tensor.bytes() > 0) {
      EXPECT_EQ(std::memcmp(found->raw(), t.tensor.raw(), static_cast<size_t>(t.tensor.bytes())), 0)
          << t.name;
    }
  }
  EXPECT_EQ(file.Find("layers.9").status(),
            absl::NotFoundError(absl::StrCat(path, ": tensor \"layers.9\" is not in this file")));
}

TEST(WriteSafetensors, RefusesNamesThatCannotBeRead) {
  const TemporaryDirectory directory;
  const std::string path = directory.path() + "/f";
  const uint8_t byte = 0;
  const ConstTensorRef tensor(&byte, DType::kU8, Device{}, Shape({1}));
  const auto write = [&](std::vector<NamedTensor> tensors) {
    return WriteSafetensors(path, std::move(tensors), {}).status();
  };
  EXPECT_EQ(write({{"a", tensor}, {"b", tensor}, {"a", tensor}}),
            Invalid(path, ": tensor \"a\" is given twice"));
  EXPECT_EQ(write({{"__metadata__", tensor}}),
            Invalid(path, ": tensor name \"__metadata__\" is reserved by the format"));
  EXPECT_TRUE(absl::StrContains(write({{"\xff", tensor}}).message(), "expected UTF-8"));
  EXPECT_FALSE(Exists(path));
  EXPECT_TRUE(absl::IsNotFound(WriteSafetensors(directory.path() + "/none/f", {}, {}).status()));
}

TEST(SafetensorsFile, AcceptsWhatTheFormatAllows) {
  const std::string unaligned = FileOf(R"({"b":{"data_offsets":[1,9],"dtype":"F32","shape":[2]},)"
                                       R"("a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
                                       "123456789");
  absl::StatusOr<SafetensorsFile> file = ParseText(unaligned);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(static_cast<const char*>(file->Find("b")->raw()), unaligned.data() + unaligned.size() - 8);

  EXPECT_TRUE(ParseText(FileOf("{}")).ok());
  EXPECT_TRUE(ParseText(FileOf("{}      ")).ok());
  EXPECT_EQ(ParseText(FileOf(R"({"__metadata__":{"k":"v"}})"))->metadata().at("k"), "v");
  EXPECT_TRUE(ParseText(FileOf(R"({"e":{"dtype":"F64","shape":[0,9],"data_offsets":[0,0]},)"
                               R"("s":{"dtype":"U8","shape":[],"data_offsets":[0,1]}})",
                               "x"))
                  .ok());
}

struct BadFile {
  std::string file;
  std::string message;  // part of it
};

std::string OneTensor(absl::string_view fields, absl::string_view data) {
  return FileOf(absl::StrCat("{\"t\":{", fields, "}}"), data);
}

TEST(SafetensorsFile, RefusesEverythingElseByName) {
  const std::string too_long = "\x01\xe1\xf5\x05" + std::string(20, '\0');
  const BadFile cases[] = {
      {"", "0 bytes: expected at least 8"},
      {std::string(7, '\1'), "7 bytes: expected at least 8"},
      {std::string(8, '\xff'), "header length 18446744073709551615: expected at most 100000000"},
      {too_long, "header length 100000001: expected at most 100000000"},
      {FileOf("{}").substr(0, 9), "header length 2: only 1 bytes follow; the file is truncated"},
      {std::string(8, '\0'), "expected it to start with '{'"},
      {FileOf(" {}"), "expected it to start with '{'"},
      {FileOf("{"), "header: not valid JSON at byte"},
      {FileOf("{} x"), "header: not valid JSON at byte"},
      {FileOf(std::string("{}\0x", 4)), "header: not valid JSON at byte 2: a NUL byte"},
      {FileOf("{\"a\xff\":1}"), "header: not valid JSON at byte"},
      {FileOf(R"({"t":[[[[1]]]]})"), "nested deeper than the 3 levels"},
      {FileOf("{\"t\":" + std::string(1'000'000, '[')), "nested deeper than the 3 levels"},
      {FileOf(R"({"t":{},"t":{}})"), "key \"t\" appears twice"},
      {FileOf(R"({"t":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}})"),
       "key \"dtype\" appears twice"},
      {FileOf(R"({"__metadata__":{"k":1}})"), "__metadata__ \"k\"=1: expected a string"},
      {FileOf(R"({"__metadata__":[]})"), "__metadata__: expected an object"},
      {FileOf(R"({"t":3})"), "tensor \"t\"=3: expected an object"},
      {OneTensor(R"("dtype":"U8","shape":[0])", ""), "tensor \"t\": \"data_offsets\" is missing"},
      {OneTensor(R"("dtype":"U8","shape":[0],"data_offsets":[0,0],"x":1)", ""), "unknown key \"x\""},
      {OneTensor(R"("dtype":"F16","shape":[1],"data_offsets":[0,2])", "12"),
       "tensor \"t\": dtype=F16 is not supported: expected F64, F32, BF16, I64, I32 or U8"},
      {OneTensor(R"("dtype":"F16","shape":[1],"data_offsets":[0,2])", "12"), "dtype=F16 is not supported"},
      {OneTensor(R"("dtype":"f32","shape":[1],"data_offsets":[0,4])", "1234"), "dtype=\"f32\" is unknown"},
      {OneTensor(R"("dtype":7,"shape":[1],"data_offsets":[0,4])", "1234"), "dtype=7: expected a string"},
      {OneTensor(R"("dtype":"U8","shape":4,"data_offsets":[0,4])", "1234"), "shape=4: expected an array"},
      {OneTensor(R"("dtype":"U8","shape":[-4],"data_offsets":[0,4])", "1234"),
       "shape[0]=-4: expected an integer from 0"},
      {OneTensor(R"("dtype":"U8","shape":[-0],"data_offsets":[0,0])", ""),
       "shape[0]=0: expected an integer from 0"},
      {OneTensor(R"("dtype":"U8","shape":[4.0],"data_offsets":[0,4])", "1234"),
       "shape[0]=4.0: expected an integer"},
      {OneTensor(R"("dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,4])", "1234"),
       "shape[0]=9223372036854775808: expected an integer from 0 to 2^63 - 1"},
      {OneTensor(R"("dtype":"U8","shape":[99999999999999999999],"data_offsets":[0,4])", "1234"),
       "shape[0]=1e+20"},
      {OneTensor(R"("dtype":"U8","shape":[1e999],"data_offsets":[0,4])", "1234"), "not valid JSON at byte"},
      {OneTensor(R"("dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0])", ""),
       "fewer than 2^63 bytes"},
      {OneTensor(R"("dtype":"F32","shape":[0,4611686018427387904,4],"data_offsets":[0,0])", ""),
       "fewer than 2^63"},
      {OneTensor(R"("dtype":"U8","shape":[1,1,1,1,1],"data_offsets":[0,1])", "1"),
       "5 dimensions: expected at most 4"},
      {OneTensor(R"("dtype":"U8","shape":[4],"data_offsets":[0])", "1234"), "data_offsets has 1 entries"},
      {OneTensor(R"("dtype":"U8","shape":[4],"data_offsets":[0,-4])", "1234"), "data_offsets[1]=-4"},
      {OneTensor(R"("dtype":"U8","shape":[4],"data_offsets":[4,0])", "1234"),
       "data_offsets=[4,0]: expected 4 bytes"},
      {OneTensor(R"("dtype":"F32","shape":[1],"data_offsets":[0,5])", "12345"),
       "expected 4 bytes for F32 [1]"},
      {OneTensor(R"("dtype":"U8","shape":[4],"data_offsets":[1,5])", "12345"),
       "tensor \"t\" begins at data byte 1: expected 0 (there is a hole before it)"},
      {OneTensor(R"("dtype":"U8","shape":[4],"data_offsets":[0,4])", "123"),
       "3 bytes of data: expected 4; the file is truncated"},
      {OneTensor(R"("dtype":"U8","shape":[4],"data_offsets":[0,4])", "12345"),
       "5 bytes of data: expected 4; there is data after the last tensor"},
      {FileOf(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
              R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
              "123"),
       "tensor \"b\" begins at data byte 1: expected 2 (it overlaps another tensor)"},
      {FileOf(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
              R"("b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
              "123"),
       "tensor \"b\" begins at data byte 2: expected 1 (there is a hole before it)"},
  };
  for (const BadFile& bad : cases) {
    const absl::Status status = ParseText(bad.file).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status << " for " << bad.message;
    EXPECT_TRUE(absl::StrContains(status.message(), bad.message)) << status << "\nexpected: " << bad.message;
    EXPECT_TRUE(absl::StartsWith(status.message(), "f: ")) << status;
  }
}

TEST(SafetensorsFile, OpenNamesThePath) {
  const TemporaryDirectory directory;
  const std::string path = directory.path() + "/f";
  EXPECT_TRUE(absl::IsNotFound(SafetensorsFile::Open(path).status()));
  Overwrite(path, "");
  const absl::Status status = SafetensorsFile::Open(path).status();
  EXPECT_TRUE(absl::StartsWith(status.message(), path + ": 0 bytes")) << status;
}

}  // namespace
}  // namespace annulus
