// Damaged files: whatever the bytes, opening and reading end in a Status or in sequences that keep their
// contract. Deterministic, so that a failure can be repeated from its number.

#include <algorithm>

#include "annulus/base/random.h"
#include "token_files.h"

namespace annulus {
namespace {

// Damages `bytes` in one to three places, mostly in its first `header` bytes.
std::string Damaged(std::string bytes, uint64_t header, const RandomStream& random, uint64_t number) {
  uint64_t draw = number << 16;
  const auto below = [&](uint64_t n) { return random.Below(draw++, n); };
  // Values at which signs, widths and products flip.
  constexpr uint64_t kEdges[] = {0,
                                 1,
                                 2,
                                 0x7f,
                                 0xff,
                                 0x7fff,
                                 0xffff,
                                 0x7fffffff,
                                 0x80000000,
                                 0xffffffff,
                                 uint64_t{1} << 61,
                                 uint64_t{1} << 62,
                                 uint64_t{1} << 63,
                                 ~uint64_t{0}};
  for (uint64_t edits = 1 + below(3); edits > 0 && !bytes.empty(); --edits) {
    const uint64_t range = below(4) > 0 ? std::min<uint64_t>(header, bytes.size()) : bytes.size();
    const uint64_t at = below(range);
    switch (below(5)) {
      case 0: bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8))); break;
      case 1: bytes[at] = static_cast<char>(below(256)); break;
      case 2: {
        const uint64_t value = kEdges[below(std::size(kEdges))];
        std::memcpy(&bytes[at], &value, std::min<size_t>(size_t{4} << below(2), bytes.size() - at));
        break;
      }
      case 3: bytes.resize(below(bytes.size() + 1)); break;
      default: bytes.append(1 + below(16), static_cast<char>(below(256)));
    }
  }
  return bytes;
}

struct Outcome {
  int refused = 0;
  int read = 0;
};

// Opens the source in several ways and reads from each.
void Try(const SourceSpec& source, Outcome* outcome) {
  constexpr int64_t kVocab = 300, kSeqLen = 5;
  for (const bool documents : {false, true}) {
    DataSpec spec = SpecOf({source}, kSeqLen);
    spec.document_mask = documents;
    spec.packing = documents ? Packing::kDocuments : Packing::kStream;
    spec.validation_fraction = 0.3;
    const auto data = DataSet::Open(spec, 1, kVocab);
    if (!data.ok()) {
      EXPECT_TRUE(Contains(data.status().message(), source.path));
      ++outcome->refused;
      continue;
    }
    for (int64_t n = 0; n < 12; ++n) {
      const auto s = n < 8 ? (*data)->Train(n) : (*data)->Validation(n % (*data)->validation_sequences());
      if (!s.ok()) {
        EXPECT_TRUE(absl::IsOutOfRange(s.status())) << s.status();
        continue;
      }
      ++outcome->read;
      ASSERT_TRUE(s->length >= 1 && s->length <= kSeqLen);
      for (size_t i = 0; i < kSeqLen; ++i) {
        ASSERT_TRUE(s->tokens[i] >= 0 && s->tokens[i] < kVocab);
        ASSERT_TRUE(s->targets[i] >= kIgnoredTarget && s->targets[i] < kVocab);
        ASSERT_TRUE(s->document_starts[i] >= 0 && s->document_starts[i] <= static_cast<int64_t>(i));
      }
    }
  }
}

// Most damage is found; some (a token changed, a mode) leaves a readable file.
void ExpectBoth(const Outcome& outcome, int files) {
  EXPECT_GT(outcome.refused, files / 4);
  EXPECT_GT(outcome.read, files / 4);
}

TEST(FuzzedData, MegatronIndexAndTokens) {
  const RandomStream random(1, "fuzz.megatron");
  const SourceSpec source = SourceAt(SourceFormat::kMegatron, TestPath("p"));
  const std::string bin = Packed<uint16_t>(Range(0, 60));
  Outcome outcome;
  for (uint64_t i = 0; i < 400; ++i) {
    SCOPED_TRACE(i);
    MegatronIndex index{.lengths = {10, 0, 20, 30}, .offsets = {0, 20, 20, 60}, .boundaries = {0, 1, 3, 4}};
    if (i % 2 == 1) index.offsets = {101, 0, 1, 41};  // not one after another, not aligned
    if (i % 3 == 0) index.modes = "\1\1\1\1";
    if (i % 2 == 1) index.lengths = {9, 0, 20, 30};
    // Three times the index (its header, or anywhere), then the tokens under a good index.
    const std::string good = index.Bytes();
    const uint64_t part = i / 6 % 4;
    WriteTestFile(source.path + ".bin", part == 3 ? Damaged(bin, bin.size(), random, i) : bin);
    WriteTestFile(source.path + ".idx",
                  part == 3 ? good : Damaged(good, part == 0 ? 34 : good.size(), random, i));
    Try(source, &outcome);
  }
  ExpectBoth(outcome, 400);
}

TEST(FuzzedData, LlmCHeaders) {
  const RandomStream random(1, "fuzz.llmc");
  SourceSpec source = SourceAt(SourceFormat::kLlmC, TestPath("p"));
  source.document_start_token = 7;
  Outcome outcome;
  for (uint64_t i = 0; i < 300; ++i) {
    SCOPED_TRACE(i);
    // Only the first 12 bytes of the header mean something; every other damage goes anywhere.
    WriteTestFile(source.path,
                  Damaged(LlmCBytes(Range(0, 60), i % 2 == 0 ? 2 : 4), i % 3 == 0 ? 2000 : 12, random, i));
    Try(source, &outcome);
  }
  ExpectBoth(outcome, 300);
}

TEST(FuzzedData, TextWithRandomSeparators) {
  const RandomStream random(1, "fuzz.text");
  Outcome outcome;
  for (uint64_t i = 0; i < 100; ++i) {
    SCOPED_TRACE(i);
    SourceSpec source =
        TextSource("p", Damaged(std::string(60, 'a') + "\n\n" + std::string(50, '\n'), 112, random, i));
    source.document_separator = std::string(random.Below(i << 32, 4), i % 2 == 0 ? '\n' : 'a');
    Try(source, &outcome);
  }
  EXPECT_GT(outcome.read, 100);
}

}  // namespace
}  // namespace annulus
