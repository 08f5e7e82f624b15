// Document masks, ignored targets and packing, against a reference that walks single tokens.

#include <algorithm>

#include "annulus/base/random.h"
#include "token_files.h"

namespace annulus {
namespace {

// Lengths of random documents, from 1 token to longer than two sequences.
std::vector<int64_t> RandomLengths(uint64_t seed, int64_t documents, uint64_t longest) {
  const RandomStream random(seed, "lengths");
  std::vector<int64_t> lengths;
  for (int64_t d = 0; d < documents; ++d) {
    lengths.push_back(1 + static_cast<int64_t>(random.Below(static_cast<uint64_t>(d), longest)));
  }
  return lengths;
}

// document[t] = number of the document that holds token t of a counting source.
std::vector<int64_t> DocumentOfToken(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> documents;
  for (size_t d = 0; d < lengths.size(); ++d) {
    documents.insert(documents.end(), static_cast<size_t>(lengths[d]), static_cast<int64_t>(d));
  }
  return documents;
}

// What is wrong with a masked sequence, "" if nothing. `end` is the end of its split.
std::string CheckMasked(const Sequence& s, const std::vector<int64_t>& document, int64_t end) {
  const int64_t seq_len = static_cast<int64_t>(s.tokens.size());
  for (int64_t i = 0; i < seq_len; ++i) {
    const size_t at = static_cast<size_t>(i);
    if (i >= s.length) {
      if (s.targets[at] != kIgnoredTarget) return "a target in the padding";
      if (s.document_starts[at] != s.length) return "padding inside of a document";
      continue;
    }
    const int64_t token = s.tokens[at];
    if (token != s.tokens[0] + i) return "tokens that do not follow each other";
    int64_t start = i;
    while (start > 0 &&
           document[static_cast<size_t>(token - i + start - 1)] == document[static_cast<size_t>(token)]) {
      --start;
    }
    if (s.document_starts[at] != start) return "a wrong document start";
    const bool last =
        token + 1 == end || document[static_cast<size_t>(token + 1)] != document[static_cast<size_t>(token)];
    if (s.targets[at] != (last ? kIgnoredTarget : token + 1)) return "a wrong target";
  }
  return "";
}

TEST(DocumentMask, StreamWindows) {
  for (uint64_t seed = 0; seed < 5; ++seed) {
    const std::vector<int64_t> lengths = RandomLengths(seed, 80, 40);
    DataSpec spec = SpecOf({CountingDocuments("p", lengths)}, 16);
    spec.document_mask = true;
    spec.validation_fraction = 0.2;
    const std::unique_ptr<DataSet> data = OpenOrDie(spec, seed);
    const std::vector<int64_t> document = DocumentOfToken(lengths);
    const int64_t cut = data->train_tokens();
    for (int64_t n = 0; n < 500; ++n) ASSERT_EQ(CheckMasked(TrainOrDie(*data, n), document, cut), "");
    for (int64_t n = 0; n < data->validation_sequences(); ++n) {
      const Sequence s = ValidationOrDie(*data, n);
      ASSERT_EQ(CheckMasked(s, document, static_cast<int64_t>(document.size())), "");
      ASSERT_GE(s.tokens[0], cut);
    }
  }
}

TEST(DocumentMask, CheckFindsDefects) {
  const std::vector<int64_t> lengths = {5, 3, 30};
  DataSpec spec = SpecOf({CountingDocuments("p", lengths)}, 37);
  spec.document_mask = true;
  const std::unique_ptr<DataSet> data = OpenOrDie(spec);
  const std::vector<int64_t> document = DocumentOfToken(lengths);
  const Sequence good = TrainOrDie(*data, 0);
  ASSERT_EQ(CheckMasked(good, document, 38), "");
  Sequence bad = good;
  bad.targets[4] = 5;
  EXPECT_EQ(CheckMasked(bad, document, 38), "a wrong target");
  bad = good;
  bad.targets[3] = kIgnoredTarget;
  EXPECT_EQ(CheckMasked(bad, document, 38), "a wrong target");
  bad = good;
  bad.document_starts[9] = 0;
  EXPECT_EQ(CheckMasked(bad, document, 38), "a wrong document start");
  bad = good;
  bad.length = 36;
  bad.targets[36] = kIgnoredTarget;
  EXPECT_EQ(CheckMasked(bad, document, 38), "padding inside of a document");
}

TEST(DocumentMask, OffMeansOneDocument) {
  DataSpec spec = SpecOf({CountingDocuments("p", RandomLengths(3, 80, 40))}, 16);
  const std::unique_ptr<DataSet> data = OpenOrDie(spec);
  for (int64_t n = 0; n < 300; ++n) {
    const Sequence s = TrainOrDie(*data, n);
    for (size_t i = 0; i < 16; ++i) {
      ASSERT_EQ(s.document_starts[i], 0);
      ASSERT_EQ(s.targets[i], s.tokens[i] + 1);
    }
  }
}

TEST(DocumentMask, TextAndLlmCFormats) {
  // The same documents in both formats: "ab|" and "cde|" and "f".
  SourceSpec text = TextSource("t", "ab|cde|f");
  text.document_separator = "|";
  SourceSpec llmc = LlmCSource("l", {'<', 'b', 'c', '<', 'd', 'e', 'f', '<'});
  llmc.document_start_token = '<';
  for (const SourceSpec& source : {text, llmc}) {
    DataSpec spec = SpecOf({source}, 7);
    spec.document_mask = true;
    const Sequence s = TrainOrDie(*OpenOrDie(spec), 0);
    EXPECT_EQ(s.document_starts, std::vector<int64_t>({0, 0, 0, 3, 3, 3, 3}));
    for (size_t i = 0; i < 7; ++i) EXPECT_EQ(s.targets[i] == kIgnoredTarget, i == 2 || i == 6) << i;
  }
}

// The packing rule, told over single documents: first token and length of each sequence.
std::vector<std::pair<int64_t, int64_t>> NaivePacking(const std::vector<int64_t>& lengths, int64_t seq_len) {
  std::vector<std::pair<int64_t, int64_t>> sequences;
  int64_t token = 0, used = seq_len;  // `used` positions of the last sequence
  for (const int64_t length : lengths) {
    if (used + length > seq_len) used = seq_len;  // close it
    for (int64_t left = length; left > 0;) {
      if (used == seq_len) {
        sequences.emplace_back(token, 0);
        used = 0;
      }
      const int64_t piece = std::min(left, seq_len - used);
      sequences.back().second += piece;
      used += piece;
      token += piece;
      left -= piece;
    }
  }
  return sequences;
}

TEST(DocumentPacking, WholeDocumentsInFileOrder) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    const std::vector<int64_t> lengths = RandomLengths(seed, 100, seed < 4 ? 12 : 40);
    const std::vector<int64_t> document = DocumentOfToken(lengths);
    const int64_t tokens = static_cast<int64_t>(document.size());
    const auto expected = NaivePacking(lengths, 16);
    DataSpec spec = SpecOf({CountingDocuments("p", lengths)}, 16);
    spec.packing = Packing::kDocuments;
    spec.document_mask = true;
    const std::unique_ptr<DataSet> data = OpenOrDie(spec, seed);
    int64_t padded = 0;
    for (int64_t epoch = 0; epoch < 3; ++epoch) {
      std::vector<std::pair<int64_t, int64_t>> got;
      for (size_t i = 0; i < expected.size(); ++i) {
        const int64_t n = epoch * static_cast<int64_t>(expected.size()) + static_cast<int64_t>(i);
        const Sequence s = TrainOrDie(*data, n);
        ASSERT_EQ(CheckMasked(s, document, tokens), "") << n;
        got.emplace_back(s.tokens[0], s.length);
        padded += s.length < 16;
      }
      EXPECT_FALSE(std::is_sorted(got.begin(), got.end()));
      std::sort(got.begin(), got.end());
      EXPECT_EQ(got, expected);
    }
    EXPECT_GT(padded, 0);
  }
}

TEST(DocumentPacking, WithoutMaskTargetsCrossBorders) {
  DataSpec spec = SpecOf({CountingDocuments("p", {3, 4, 20})}, 8);
  spec.packing = Packing::kDocuments;
  const std::unique_ptr<DataSet> data = OpenOrDie(spec);
  int64_t tokens = 0;
  for (int64_t n = 0; n < 4; ++n) {  // 0..6, 7..14, 15..22, 23..26
    const Sequence s = TrainOrDie(*data, n);
    tokens += s.length;
    for (int64_t i = 0; i < 8; ++i) {
      const size_t at = static_cast<size_t>(i);
      EXPECT_EQ(s.document_starts[at], 0);
      const bool counted = i < s.length && s.tokens[at] != 26;
      EXPECT_EQ(s.targets[at], counted ? s.tokens[at] + 1 : kIgnoredTarget);
    }
  }
  EXPECT_EQ(tokens, 27);
}

TEST(DocumentPacking, ValidationToo) {
  DataSpec spec = SpecOf({CountingDocuments("p", {30, 3, 4, 20, 1})}, 8);
  spec.packing = Packing::kDocuments;
  spec.document_mask = true;
  spec.validation_fraction = 0.45;
  const std::unique_ptr<DataSet> data = OpenOrDie(spec);
  EXPECT_EQ(data->train_tokens(), 33);
  ASSERT_EQ(data->validation_sequences(), 4);  // 33..36, then 20 tokens as 8 + 8 + 4 with the last document
  std::vector<std::pair<int64_t, int64_t>> got;
  for (int64_t n = 0; n < 4; ++n) {
    const Sequence s = ValidationOrDie(*data, n);
    got.emplace_back(s.tokens[0], s.length);
  }
  std::sort(got.begin(), got.end());
  EXPECT_EQ(got, (std::vector<std::pair<int64_t, int64_t>>{{33, 4}, {37, 8}, {45, 8}, {53, 5}}));
}

TEST(DocumentPacking, OneTokenIsTooFew) {
  DataSpec spec = SpecOf({CountingSource("p", 0, 1)}, 8);
  spec.packing = Packing::kDocuments;
  EXPECT_TRUE(Contains(DataSet::Open(spec, 1, 10).status().message(),
                       "tokens=1 in the training split: expected at least 2 (a token and its target)"));
}

}  // namespace
}  // namespace annulus
