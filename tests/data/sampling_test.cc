// Which tokens come when: epochs, mixing, splits, order of calls, fingerprint. Most sources count upwards,
// so that a token tells the position it was read from.

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <set>

#include "annulus/base/random.h"
#include "token_files.h"

namespace annulus {
namespace {

bool Same(const Sequence& a, const Sequence& b) {
  return a.tokens == b.tokens && a.targets == b.targets && a.document_starts == b.document_starts &&
         a.length == b.length;
}

// Checks that `sequences`, cut from a counting source, are windows that lie side by side, each once, with
// the next token as every target. Returns what is wrong, "" if nothing, and the sorted first tokens.
std::string CheckTiling(const std::vector<Sequence>& sequences, std::vector<int64_t>* begins) {
  begins->clear();
  for (const Sequence& s : sequences) {
    const int64_t seq_len = static_cast<int64_t>(s.tokens.size());
    if (s.length != seq_len) return "a window with padding";
    for (int64_t i = 0; i < seq_len; ++i) {
      const size_t at = static_cast<size_t>(i);
      if (s.tokens[at] != s.tokens[0] + i) return "tokens that do not follow each other";
      if (s.targets[at] != s.tokens[at] + 1) return "a target that is not the next token";
      if (s.document_starts[at] != 0) return "a document start without a mask";
    }
    begins->push_back(s.tokens[0]);
  }
  std::sort(begins->begin(), begins->end());
  for (size_t i = 1; i < begins->size(); ++i) {
    const int64_t step = (*begins)[i] - (*begins)[i - 1];
    if (step != static_cast<int64_t>(sequences[0].tokens.size())) return absl::StrCat("a step of ", step);
  }
  return "";
}

std::vector<Sequence> TrainRange(const DataSet& data, int64_t begin, int64_t end) {
  std::vector<Sequence> sequences;
  for (int64_t n = begin; n < end; ++n) sequences.push_back(TrainOrDie(data, n));
  return sequences;
}

TEST(Sampling, EachWindowOnceAnEpochWithMovingBorders) {
  constexpr int64_t kTokens = 1000, kSeqLen = 16, kWindows = 61;  // 1000 / 16 - 1
  const std::unique_ptr<DataSet> data = OpenOrDie(SpecOf({CountingSource("p", 0, kTokens)}, kSeqLen));
  EXPECT_EQ(data->train_tokens(), kTokens);
  EXPECT_EQ(data->validation_tokens(), 0);
  EXPECT_EQ(data->validation_sequences(), 0);
  std::set<int64_t> phases, seen;
  std::set<std::vector<int64_t>> orders;
  for (int64_t epoch = 0; epoch < 200; ++epoch) {
    const std::vector<Sequence> sequences = TrainRange(*data, epoch * kWindows, (epoch + 1) * kWindows);
    std::vector<int64_t> begins, order;
    ASSERT_EQ(CheckTiling(sequences, &begins), "") << "epoch " << epoch;
    ASSERT_EQ(begins.size(), static_cast<size_t>(kWindows));
    phases.insert(begins[0]);
    for (const Sequence& s : sequences) {
      order.push_back((s.tokens[0] - begins[0]) / kSeqLen);
      seen.insert(s.tokens.begin(), s.tokens.end());
      seen.insert(s.targets.back());
    }
    orders.insert(order);
  }
  EXPECT_GE(phases.size(), static_cast<size_t>(kSeqLen));  // of the 24 that fit
  EXPECT_EQ(orders.size(), 200u);
  EXPECT_EQ(seen.size(), static_cast<size_t>(kTokens));  // no token is left out for good
}

TEST(Sampling, TilingCheckFindsDefects) {
  const std::unique_ptr<DataSet> data = OpenOrDie(SpecOf({CountingSource("p", 0, 100)}, 8));
  const std::vector<Sequence> good = TrainRange(*data, 0, 11);
  std::vector<int64_t> begins;
  ASSERT_EQ(CheckTiling(good, &begins), "");
  std::vector<Sequence> bad = good;
  bad[3] = bad[4];
  EXPECT_EQ(CheckTiling(bad, &begins), "a step of 0");
  bad = good;
  bad.erase(std::find_if(bad.begin(), bad.end(), [](const Sequence& s) { return s.tokens[0] > 40; }));
  EXPECT_EQ(CheckTiling(bad, &begins), "a step of 16");
  bad = good;
  bad[5].targets[2] += 1;
  EXPECT_EQ(CheckTiling(bad, &begins), "a target that is not the next token");
  bad = good;
  std::swap(bad[5].tokens[2], bad[5].tokens[3]);
  EXPECT_EQ(CheckTiling(bad, &begins), "tokens that do not follow each other");
}

TEST(Sampling, SmallSources) {
  for (int64_t tokens = 9; tokens < 30; ++tokens) {
    const std::unique_ptr<DataSet> data = OpenOrDie(SpecOf({CountingSource("p", 0, tokens)}, 8));
    std::set<int64_t> seen;
    for (const Sequence& s : TrainRange(*data, 0, 400)) {
      std::vector<int64_t> begins;
      ASSERT_EQ(CheckTiling({s}, &begins), "");
      seen.insert(s.tokens.begin(), s.tokens.end());
      seen.insert(s.targets.back());
    }
    EXPECT_EQ(seen.size(), static_cast<size_t>(tokens));
  }
  const absl::Status status = DataSet::Open(SpecOf({CountingSource("p", 0, 8)}, 8), 1, 100).status();
  EXPECT_TRUE(Contains(status.message(), "tokens=8 in the training split: expected at least 9")) << status;
}

TEST(Sampling, IndependentOfTheOrderOfCalls) {
  DataSpec spec = SpecOf({CountingSource("a", 0, 3000), CountingSource("b", 5000, 9000)}, 16);
  spec.validation_fraction = 0.1;
  const std::unique_ptr<DataSet> forward = OpenOrDie(spec), random = OpenOrDie(spec);
  const std::vector<Sequence> expected = TrainRange(*forward, 0, 3000);
  const Permutation order(3000, 7, "calls");
  for (uint64_t i = 0; i < 3000; ++i) {
    const uint64_t n = order(i);
    ASSERT_TRUE(Same(TrainOrDie(*random, static_cast<int64_t>(n)), expected[n])) << n;
    if (i % 100 == 0) ValidationOrDie(*random, static_cast<int64_t>(i) % random->validation_sequences());
  }
  // Far into a run, without anything that grows with the position.
  EXPECT_TRUE(Same(TrainOrDie(*random, int64_t{1} << 60), TrainOrDie(*forward, int64_t{1} << 60)));
}

TEST(Sampling, SeedsDiffer) {
  const DataSpec spec = SpecOf({CountingSource("p", 0, 100000)}, 16);
  const std::unique_ptr<DataSet> a = OpenOrDie(spec, 1), b = OpenOrDie(spec, 2), c = OpenOrDie(spec, 1);
  int same = 0;
  for (int64_t n = 0; n < 100; ++n) {
    same += Same(TrainOrDie(*a, n), TrainOrDie(*b, n));
    EXPECT_TRUE(Same(TrainOrDie(*a, n), TrainOrDie(*c, n)));
  }
  EXPECT_LE(same, 2);
}

TEST(Mixing, ExactPerPeriodAndEachWindowOnceAnEpoch) {
  DataSpec spec = SpecOf(
      {CountingSource("a", 0, 1000), CountingSource("b", 10000, 20000), CountingSource("c", 30000, 30050)},
      8);
  spec.train[0].weight = 5;
  spec.train[1].weight = 3;
  spec.train[2].weight = 2;
  const std::unique_ptr<DataSet> data = OpenOrDie(spec);
  // 512, 307.2 and 204.8 of 1024; the one slot left goes to the largest remainder.
  const std::map<int64_t, int> expected = {{0, 512}, {1, 307}, {2, 205}};
  std::map<int64_t, std::vector<Sequence>> by_source;
  std::set<std::vector<int64_t>> orders;
  for (int64_t period = 0; period < 6; ++period) {
    std::map<int64_t, int> counts;
    std::vector<int64_t> order;
    for (const Sequence& s : TrainRange(*data, 1024 * period, 1024 * (period + 1))) {
      const int64_t source = s.tokens[0] < 10000 ? 0 : s.tokens[0] < 30000 ? 1 : 2;
      ++counts[source];
      order.push_back(source);
      by_source[source].push_back(s);
    }
    EXPECT_EQ(counts, expected) << "period " << period;
    EXPECT_FALSE(std::is_sorted(order.begin(), order.end()));
    orders.insert(order);
  }
  EXPECT_EQ(orders.size(), 6u);
  const std::map<int64_t, size_t> windows = {{0, 124}, {1, 1249}, {2, 5}};
  for (const auto& [source, sequences] : by_source) {
    const size_t count = windows.at(source);
    ASSERT_GE(sequences.size(), count);
    for (size_t at = 0; at + count <= sequences.size(); at += count) {
      std::vector<int64_t> begins;
      const auto epoch = sequences.begin() + static_cast<std::ptrdiff_t>(at);
      EXPECT_EQ(CheckTiling({epoch, epoch + static_cast<std::ptrdiff_t>(count)}, &begins), "")
          << "source " << source << " from " << at;
    }
  }
}

TEST(Mixing, BadWeights) {
  DataSpec spec = SpecOf({CountingSource("a", 0, 100), CountingSource("b", 0, 100)}, 8);
  const auto error = [&](double weight) {
    spec.train[1].weight = weight;
    const absl::Status status = DataSet::Open(spec, 1, 100).status();
    return std::string(status.message());
  };
  EXPECT_EQ(error(0.002), "");
  EXPECT_EQ(error(4095), "data.train[0].weight=1: expected at least 4, 1/1024 of the sum of the weights");
  EXPECT_TRUE(Contains(error(0), "data.train[1].weight=0: expected a finite number above 0"));
  EXPECT_TRUE(Contains(error(-1), "data.train[1].weight=-1"));
  EXPECT_TRUE(Contains(error(std::nan("")), "data.train[1].weight=nan"));
  EXPECT_TRUE(Contains(error(HUGE_VAL), "data.train[1].weight=inf"));
  EXPECT_TRUE(Contains(error(1e-5), "data.train[1].weight=1e-05: expected at least 0.00097"));
  spec.train[0].weight = 1e308;
  EXPECT_TRUE(Contains(error(1e308), "expected a finite sum"));
}

// First token position after everything that training reads in `sequences` sequences, targets included.
int64_t TrainEnd(const DataSet& data, int64_t sequences) {
  int64_t end = 0;
  for (const Sequence& s : TrainRange(data, 0, sequences)) {
    end = std::max<int64_t>(end, *std::max_element(s.tokens.begin(), s.tokens.end()) + 1);
    end = std::max<int64_t>(end, *std::max_element(s.targets.begin(), s.targets.end()) + 1);
  }
  return end;
}

// First position that validation reads in one pass, where each window comes once.
int64_t ValidationBegin(const DataSet& data) {
  std::vector<Sequence> sequences;
  for (int64_t n = 0; n < data.validation_sequences(); ++n) sequences.push_back(ValidationOrDie(data, n));
  std::vector<int64_t> begins;
  EXPECT_EQ(CheckTiling(sequences, &begins), "");
  return begins[0];
}

TEST(Split, ATokenCutsASourceOfOneDocument) {
  DataSpec spec = SpecOf({CountingSource("p", 0, 1000)}, 16);
  spec.validation_fraction = 0.1;
  const std::unique_ptr<DataSet> data = OpenOrDie(spec);
  EXPECT_EQ(data->train_tokens(), 900);
  EXPECT_EQ(data->validation_tokens(), 100);
  EXPECT_EQ(data->validation_sequences(), 6);  // (100 - 1) / 16
  EXPECT_EQ(ValidationBegin(*data), 900);
  EXPECT_EQ(TrainEnd(*data, 5000), 900);  // reached, never passed, in about 90 epochs
}

TEST(Split, ADocumentBorderCutsASourceOfSeveral) {
  struct Case {
    double fraction;
    int64_t cut;
  };
  // Documents start at 0, 300, 620, 700, 950; the border nearest to the fraction is taken.
  for (const Case c : {Case{0.1, 950}, Case{0.2, 700}, Case{0.35, 620}, Case{0.33, 700}, Case{0.6, 300},
                       Case{0.01, 950}, Case{0.98, 300}}) {
    DataSpec spec = SpecOf({CountingDocuments("p", {300, 320, 80, 250, 50})}, 16);
    spec.validation_fraction = c.fraction;
    for (const Packing packing : {Packing::kStream, Packing::kDocuments}) {
      spec.packing = packing;
      const std::unique_ptr<DataSet> data = OpenOrDie(spec);
      EXPECT_EQ(data->train_tokens(), c.cut) << c.fraction;
      EXPECT_EQ(data->validation_tokens(), 1000 - c.cut);
      EXPECT_EQ(TrainEnd(*data, 3000), c.cut);
      if (packing == Packing::kStream) {
        EXPECT_EQ(ValidationBegin(*data), c.cut);
      }
    }
  }
}

TEST(Split, ValidationSourcesOfTheirOwn) {
  DataSpec spec = SpecOf({CountingSource("t", 0, 1000)}, 16);
  spec.validation = {CountingSource("v", 5000, 5100), CountingSource("w", 7000, 7400)};
  spec.validation_fraction = 0.5;  // without effect beside sources
  const std::unique_ptr<DataSet> data = OpenOrDie(spec, 1), other_seed = OpenOrDie(spec, 2);
  EXPECT_EQ(data->train_tokens(), 1000);
  EXPECT_EQ(data->validation_tokens(), 500);
  ASSERT_EQ(data->validation_sequences(), 6 + 24);
  std::vector<Sequence> small, large;
  int64_t small_in_first_half = 0;
  for (int64_t n = 0; n < 30; ++n) {
    const Sequence s = ValidationOrDie(*data, n);
    EXPECT_TRUE(Same(s, ValidationOrDie(*other_seed, n)));
    (s.tokens[0] < 7000 ? small : large).push_back(s);
    if (n < 15) small_in_first_half = static_cast<int64_t>(small.size());
  }
  std::vector<int64_t> begins;
  EXPECT_EQ(CheckTiling(small, &begins), "");
  EXPECT_EQ(begins.size(), 6u);
  EXPECT_EQ(CheckTiling(large, &begins), "");
  EXPECT_EQ(begins.size(), 24u);
  // Sources are interleaved: a short evaluation sees both.
  EXPECT_GT(small_in_first_half, 0);
  EXPECT_LT(small_in_first_half, 6);
}

TEST(Split, TooSmallPartsAreRefused) {
  DataSpec spec = SpecOf({CountingSource("p", 0, 1000)}, 16);
  const auto error = [&](double fraction) {
    spec.validation_fraction = fraction;
    return std::string(DataSet::Open(spec, 1, kTestVocab).status().message());
  };
  EXPECT_EQ(error(0.017), "");
  EXPECT_EQ(error(0.016),
            spec.train[0].path +
                ": tokens=16 in the validation split at "
                "data.validation_fraction=0.016 of 1000: expected at least 17 (data.seq_len + 1)");
  EXPECT_TRUE(Contains(error(1e-9), "tokens=0 in the validation split"));
  EXPECT_TRUE(Contains(error(0.99), "tokens=10 in the training split"));
  EXPECT_TRUE(Contains(error(1.0), "data.validation_fraction=1: expected 0 to below 1"));
  EXPECT_TRUE(Contains(error(-0.1), "data.validation_fraction=-0.1"));
  EXPECT_TRUE(Contains(error(std::nan("")), "data.validation_fraction=nan"));
  spec.validation = {CountingSource("v", 0, 16)};
  EXPECT_TRUE(Contains(error(0), spec.validation[0].path + ": tokens=16 in the validation source"));
}

TEST(Open, BadSpecs) {
  const SourceSpec source = CountingSource("p", 0, 100);
  const auto error = [](const DataSpec& spec, int64_t vocab_size) {
    return std::string(DataSet::Open(spec, 1, vocab_size).status().message());
  };
  EXPECT_TRUE(Contains(error(SpecOf({}, 8), 100), "data.train: expected at least one source"));
  EXPECT_TRUE(Contains(error(SpecOf({source}, 0), 100), "data.seq_len=0: expected 1 to"));
  EXPECT_TRUE(Contains(error(SpecOf({source}, INT64_MAX), 100), "data.seq_len=9223372036854775807"));
  EXPECT_TRUE(Contains(error(SpecOf({source}, 8), 0), "vocab_size=0: expected 1 to"));
  EXPECT_TRUE(Contains(error(SpecOf({source}, 8), int64_t{1} << 31), "vocab_size=2147483648"));
  EXPECT_TRUE(Contains(error(SpecOf({TextSource("empty", "")}, 8), 256), "tokens=0 in the training split"));
  const std::unique_ptr<DataSet> data = OpenOrDie(SpecOf({source}, 8));
  EXPECT_TRUE(absl::IsOutOfRange(data->Train(-1).status()));
  EXPECT_TRUE(absl::IsOutOfRange(data->Validation(0).status()));
}

TEST(Fingerprint, ChangesWithWhateverTrainDependsOn) {
  const auto of = [](const DataSpec& spec, uint64_t seed = 1) {
    return OpenOrDie(spec, seed)->fingerprint();
  };
  const DataSpec base = SpecOf({CountingSource("a", 0, 200000), CountingSource("b", 0, 300)}, 16);
  std::set<uint64_t> seen = {of(base), of(base, 2)};
  const auto add = [&](const std::function<void(DataSpec&)>& change) {
    DataSpec spec = base;
    change(spec);
    EXPECT_TRUE(seen.insert(of(spec)).second) << "change " << seen.size() - 1 << " had no effect";
  };
  add([](DataSpec& s) { s.seq_len = 17; });
  add([](DataSpec& s) { s.document_mask = true; });
  add([](DataSpec& s) { s.packing = Packing::kDocuments; });
  add([](DataSpec& s) { s.validation_fraction = 0.1; });
  add([](DataSpec& s) { s.train[0].weight = 3; });
  add([](DataSpec& s) { s.train[1].document_start_token = 5; });
  add([](DataSpec& s) { std::swap(s.train[0], s.train[1]); });
  add([](DataSpec& s) { s.train.pop_back(); });
  add([](DataSpec& s) { s.train[0] = CountingSource("longer", 0, 200001); });
  add([](DataSpec& s) { s.train[0] = CountingSource("shifted", 1, 200001); });
  std::vector<int64_t> tokens = Range(0, 200000);
  tokens.back() = 0;
  add([&](DataSpec& s) { s.train[0] = LlmCSource("last", tokens); });
  tokens = Range(0, 300);
  tokens[150] = 0;  // any token of a small file
  add([&](DataSpec& s) { s.train[1] = LlmCSource("middle", tokens); });

  DataSpec moved = base;
  moved.train[0] = CountingSource("moved", 0, 200000);
  moved.validation = {CountingSource("v", 0, 100)};
  EXPECT_EQ(of(moved), of(base));
  DataSpec scaled = base;
  for (SourceSpec& source : scaled.train) source.weight *= 2;
  EXPECT_EQ(of(scaled), of(base));
}

}  // namespace
}  // namespace annulus
