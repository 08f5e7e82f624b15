// Sequences of associative recall: what they hold, and when they are the same.

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <set>

#include "token_files.h"

namespace annulus {
namespace {

constexpr int64_t kVocab = 200;

DataSpec RecallOf(std::vector<RecallTask> tasks, int64_t seq_len) {
  DataSpec spec;
  spec.seq_len = seq_len;
  spec.recall = RecallSpec{.tasks = std::move(tasks), .validation_tasks = {}};
  return spec;
}

std::unique_ptr<DataSet> Recall(const DataSpec& spec, uint64_t seed = 7) {
  absl::StatusOr<std::unique_ptr<DataSet>> data = DataSet::Open(spec, seed, kVocab);
  ANNULUS_CHECK(data.ok()) << data.status();
  return *std::move(data);
}

// What is wrong with the sequence of a task; "" if nothing.
std::string Defect(const Sequence& sequence, const RecallTask& task) {
  if (sequence.length != task.length) return "length";
  std::map<int32_t, int32_t> value_of;
  std::set<int32_t> values;
  for (int64_t i = 0; i < task.pairs; ++i) {
    const size_t at = static_cast<size_t>(2 * i);
    const int32_t key = sequence.tokens[at], value = sequence.tokens[at + 1];
    if (key < 1 || key >= kVocab / 2 || !value_of.emplace(key, value).second) return "keys";
    if (value < kVocab / 2 || value >= kVocab || !values.insert(value).second) return "values";
  }
  std::set<int32_t> asked;
  for (size_t t = 0; t < sequence.targets.size(); ++t) {
    if (sequence.tokens[t] < 0 || sequence.tokens[t] >= kVocab) return "vocabulary";
    if (sequence.targets[t] == kIgnoredTarget) continue;
    const int64_t position = static_cast<int64_t>(t);
    if (position < 2 * task.pairs || position >= task.length || position % 2 != 0) return "place of a query";
    const auto pair = value_of.find(sequence.tokens[t]);
    if (pair == value_of.end() || pair->second != sequence.targets[t]) return "answer";
    if (!asked.insert(pair->first).second) return "asked twice";
  }
  return static_cast<int64_t>(asked.size()) == task.pairs ? "" : "a pair that is not asked for";
}

TEST(Recall, EveryQueryIsAnsweredByTheValueOfItsKey) {
  const std::vector<RecallTask> tasks = {{4, 1}, {31, 7}, {64, 16}, {33, 1}};
  const std::unique_ptr<DataSet> data = Recall(RecallOf(tasks, 64));
  for (int64_t n = 0; n < 400; ++n) {
    const RecallTask& task = tasks[static_cast<size_t>(n) % tasks.size()];  // they take turns
    EXPECT_EQ(Defect(TrainOrDie(*data, n), task), "") << n;
    EXPECT_EQ(Defect(data->Validation(n).value(), task), "") << n;
  }
}

TEST(Recall, TheCheckFindsDefects) {
  const RecallTask task{32, 4};
  const Sequence good = TrainOrDie(*Recall(RecallOf({task}, 40)), 0);
  ASSERT_EQ(Defect(good, task), "");
  const auto changed = [&](const std::function<void(Sequence&)>& change) {
    Sequence sequence = good;
    change(sequence);
    return Defect(sequence, task);
  };
  const size_t query = static_cast<size_t>(
      std::find_if(good.targets.begin(), good.targets.end(), [](int32_t t) { return t >= 0; }) -
      good.targets.begin());
  EXPECT_EQ(changed([](Sequence& s) { s.length = 40; }), "length");
  EXPECT_EQ(changed([](Sequence& s) { s.tokens[2] = s.tokens[0]; }), "keys");
  EXPECT_EQ(changed([](Sequence& s) { s.tokens[3] = s.tokens[1]; }), "values");
  EXPECT_EQ(changed([](Sequence& s) { s.tokens[1] = 5; }), "values");
  EXPECT_EQ(changed([](Sequence& s) { s.tokens[30] = kVocab; }), "vocabulary");
  EXPECT_EQ(changed([](Sequence& s) { s.targets[1] = s.tokens[1]; }), "place of a query");
  EXPECT_EQ(changed([](Sequence& s) { s.targets[34] = s.tokens[1]; }), "place of a query");
  EXPECT_EQ(changed([&](Sequence& s) { s.targets[query] ^= 1; }), "answer");
  EXPECT_EQ(changed([&](Sequence& s) { s.tokens[query] = 0; }), "answer");
  EXPECT_EQ(changed([&](Sequence& s) { s.targets[query] = kIgnoredTarget; }), "a pair that is not asked for");
}

bool Same(const Sequence& a, const Sequence& b) {
  return a.tokens == b.tokens && a.targets == b.targets && a.length == b.length;
}

// Ranks open their own data sets and read what is theirs, in whatever order.
TEST(Recall, ASequenceIsAFunctionOfSeedAndNumber) {
  const DataSpec spec = RecallOf({{32, 4}, {24, 2}}, 32);
  const std::unique_ptr<DataSet> one = Recall(spec), two = Recall(spec), other = Recall(spec, 8);
  for (int64_t n = 19; n >= 0; --n) {
    const Sequence want = TrainOrDie(*one, n);
    EXPECT_TRUE(Same(TrainOrDie(*two, n), want)) << n;
    EXPECT_FALSE(Same(TrainOrDie(*other, n), want)) << n;
    EXPECT_FALSE(Same(TrainOrDie(*one, n + 2), want)) << n;
    EXPECT_FALSE(Same(one->Validation(n).value(), want)) << n;
    EXPECT_TRUE(Same(two->Validation(n).value(), one->Validation(n).value())) << n;
  }
}

TEST(Recall, TrainingRepeatsAndValidationEnds) {
  DataSpec spec = RecallOf({{16, 2}}, 16);
  spec.recall->train_sequences = 5;
  spec.recall->validation_sequences = 3;
  const std::unique_ptr<DataSet> data = Recall(spec);
  for (int64_t n = 0; n < 5; ++n) EXPECT_TRUE(Same(TrainOrDie(*data, n), TrainOrDie(*data, n + 10)));
  EXPECT_EQ(data->validation_sequences(), 3);
  EXPECT_EQ(data->train_tokens(), 80);
  EXPECT_EQ(data->validation_tokens(), 48);
  EXPECT_EQ(data->Validation(3).status().code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(data->Validation(-1).status().code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(data->Train(-1).status().code(), absl::StatusCode::kOutOfRange);
}

TEST(Recall, ValidationMayHaveTasksOfItsOwn) {
  DataSpec spec = RecallOf({{16, 2}, {20, 1}}, 32);
  const uint64_t fingerprint = Recall(spec)->fingerprint();
  spec.recall->validation_tasks = {{32, 8}};
  const std::unique_ptr<DataSet> data = Recall(spec);
  for (int64_t n = 0; n < 10; ++n) {
    EXPECT_EQ(Defect(data->Validation(n).value(), {32, 8}), "");
    EXPECT_EQ(TrainOrDie(*data, n).length, n % 2 == 0 ? 16 : 20);
  }
  EXPECT_EQ(data->fingerprint(), fingerprint);  // of what is trained on
}

TEST(Recall, FingerprintIsThatOfTheTrainingSequences) {
  const DataSpec spec = RecallOf({{16, 2}, {20, 1}}, 32);
  const uint64_t fingerprint = Recall(spec)->fingerprint();
  EXPECT_EQ(Recall(spec)->fingerprint(), fingerprint);
  EXPECT_NE(Recall(spec, 8)->fingerprint(), fingerprint);
  const auto changed = [&](const std::function<void(DataSpec&)>& change) {
    DataSpec other = spec;
    change(other);
    return Recall(other)->fingerprint();
  };
  EXPECT_NE(changed([](DataSpec& s) { s.seq_len = 33; }), fingerprint);
  EXPECT_NE(changed([](DataSpec& s) { s.recall->tasks[1].pairs = 2; }), fingerprint);
  EXPECT_NE(changed([](DataSpec& s) { s.recall->tasks[0].length = 17; }), fingerprint);
  EXPECT_NE(changed([](DataSpec& s) { s.recall->tasks.pop_back(); }), fingerprint);
  EXPECT_NE(changed([](DataSpec& s) { s.recall->train_sequences = 99; }), fingerprint);
  EXPECT_EQ(changed([](DataSpec& s) { s.recall->validation_sequences = 99; }), fingerprint);
}

// One query a sequence shows the distribution itself: p(g) ~ g^(0.01 - 1).
TEST(Recall, GapsAreMostlySmall) {
  constexpr int64_t kGaps = 8, kSequences = 20000;
  const std::unique_ptr<DataSet> data = Recall(RecallOf({{2 + 2 * kGaps, 1}}, 2 + 2 * kGaps));
  std::vector<double> share(kGaps), want(kGaps);
  double total = 0;
  for (int64_t n = 0; n < kSequences; ++n) {
    const Sequence sequence = TrainOrDie(*data, n);
    for (int64_t gap = 0; gap < kGaps; ++gap) {
      const bool asked = sequence.targets[static_cast<size_t>(2 + 2 * gap)] != kIgnoredTarget;
      share[static_cast<size_t>(gap)] += asked ? 1.0 / kSequences : 0;
    }
  }
  for (size_t gap = 0; gap < want.size(); ++gap) total += want[gap] = std::pow(gap + 1.0, 0.01 - 1);
  for (size_t gap = 0; gap < want.size(); ++gap) {
    const double p = want[gap] / total;
    EXPECT_NEAR(share[gap], p, 5 * std::sqrt(p * (1 - p) / kSequences)) << gap;  // five standard deviations
    if (gap > 0) {
      EXPECT_LT(share[gap], share[gap - 1]) << gap;
    }
  }
}

// Pairs take their gaps in order, so that earlier ones are asked for sooner: a pair has the nearest gap if it
// draws it and none before did.
TEST(Recall, GapsAreDrawnPairByPair) {
  constexpr int64_t kPairs = 2, kGaps = 6, kSequences = 20000;
  const int64_t length = 2 * kPairs + 2 * kGaps;
  const std::unique_ptr<DataSet> data = Recall(RecallOf({{length, kPairs}}, length));
  std::vector<double> weight(kGaps), nearest(kPairs);
  for (int64_t n = 0; n < kSequences; ++n) {
    const Sequence sequence = TrainOrDie(*data, n);
    if (sequence.targets[2 * kPairs] == kIgnoredTarget) continue;
    for (size_t i = 0; i < nearest.size(); ++i)
      nearest[i] += (sequence.tokens[2 * i] == sequence.tokens[2 * kPairs]) / double{kSequences};
  }
  double total = 0, second = 0;
  for (size_t gap = 0; gap < weight.size(); ++gap) total += weight[gap] = std::pow(gap + 1.0, 0.01 - 1);
  for (size_t gap = 1; gap < weight.size(); ++gap)
    second += weight[gap] / total * weight[0] / (total - weight[gap]);
  const double first = weight[0] / total;
  EXPECT_NEAR(nearest[0], first,
              5 * std::sqrt(first * (1 - first) / kSequences));  // five standard deviations
  EXPECT_NEAR(nearest[1], second, 5 * std::sqrt(second * (1 - second) / kSequences));
}

}  // namespace
}  // namespace annulus
