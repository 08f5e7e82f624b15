#include "recall_data_set.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "annulus/base/check.h"
#include "annulus/base/hash.h"
#include "annulus/base/random.h"

namespace annulus {
namespace {

constexpr double kPower = 0.01;  // of the gaps, as published

// Numbers of one sequence, each drawn once.
class Draws {
 public:
  Draws(uint64_t seed, const std::string& name) : random_(seed, name) {}
  int64_t Below(int64_t n) { return static_cast<int64_t>(random_.Below(next_++, static_cast<uint64_t>(n))); }
  double Uniform() { return random_.Uniform(next_++); }

 private:
  RandomStream random_;
  uint64_t next_ = 0;
};

// `count` of [begin, end), each at most once, in random order (Floyd; then the order of drawing is random
// too).
std::vector<int32_t> DrawDistinct(Draws& draws, int64_t begin, int64_t end, int64_t count) {
  std::vector<int32_t> drawn;
  for (int64_t top = end - begin - count; top < end - begin; ++top) {
    const int32_t candidate = static_cast<int32_t>(begin + draws.Below(top + 1));
    const bool taken = std::find(drawn.begin(), drawn.end(), candidate) != drawn.end();
    const auto place = drawn.begin() + draws.Below(static_cast<int64_t>(drawn.size()) + 1);
    drawn.insert(place, taken ? static_cast<int32_t>(begin + top) : candidate);
  }
  return drawn;
}

// `count` of the gaps 0 .. space - 1, without replacement, by weight: those with the largest log(u) / w
// (Efraimidis and Spirakis, 2006).
std::vector<int64_t> DrawGaps(Draws& draws, int64_t space, int64_t count) {
  std::vector<std::pair<double, int64_t>> keys;
  for (int64_t gap = 0; gap < space; ++gap) {
    const double weight = std::pow(static_cast<double>(gap + 1), kPower - 1);
    keys.emplace_back(std::log1p(-draws.Uniform()) / weight, gap);
  }
  std::partial_sort(keys.begin(), keys.begin() + count, keys.end(), std::greater<>());
  std::vector<int64_t> gaps;
  for (int64_t i = 0; i < count; ++i) gaps.push_back(keys[static_cast<size_t>(i)].second);
  return gaps;
}

class RecallDataSet final : public DataSet {
 public:
  RecallDataSet(const DataSpec& spec, uint64_t seed, int64_t vocab_size)
      : recall_(*spec.recall), seq_len_(spec.seq_len), seed_(seed), vocab_size_(vocab_size) {}

  absl::StatusOr<Sequence> Train(int64_t sequence) const override {
    if (sequence < 0) return OutOfRange("training", sequence, std::numeric_limits<int64_t>::max());
    return Make("data/recall/train", recall_.tasks, sequence % recall_.train_sequences);
  }
  int64_t validation_sequences() const override { return recall_.validation_sequences; }
  absl::StatusOr<Sequence> Validation(int64_t sequence) const override {
    if (sequence < 0 || sequence >= recall_.validation_sequences) {
      return OutOfRange("validation", sequence, recall_.validation_sequences);
    }
    const bool own = !recall_.validation_tasks.empty();
    return Make("data/recall/validation", own ? recall_.validation_tasks : recall_.tasks, sequence);
  }
  int64_t train_tokens() const override { return recall_.train_sequences * seq_len_; }
  int64_t validation_tokens() const override { return recall_.validation_sequences * seq_len_; }
  uint64_t fingerprint() const override {
    Hasher hasher;
    for (const uint64_t value : {seed_, static_cast<uint64_t>(seq_len_), static_cast<uint64_t>(vocab_size_),
                                 static_cast<uint64_t>(recall_.train_sequences)}) {
      hasher.UpdateValue(value);
    }
    for (const RecallTask& task : recall_.tasks) {
      hasher.UpdateValue(task.length);
      hasher.UpdateValue(task.pairs);
    }
    return hasher.Digest();
  }

 private:
  static absl::Status OutOfRange(absl::string_view split, int64_t sequence, int64_t count) {
    return absl::OutOfRangeError(
        absl::StrCat(split, " sequence=", sequence, ": expected at least 0 and below ", count));
  }

  // Tasks take turns.
  Sequence Make(const std::string& stream, const std::vector<RecallTask>& tasks, int64_t index) const {
    const RecallTask& task = tasks[static_cast<size_t>(index) % tasks.size()];
    Draws draws(seed_, absl::StrCat(stream, "/", index));
    Sequence sequence{.tokens = std::vector<int32_t>(static_cast<size_t>(seq_len_)),
                      .targets = std::vector<int32_t>(static_cast<size_t>(seq_len_), kIgnoredTarget),
                      .document_starts = std::vector<int64_t>(static_cast<size_t>(seq_len_)),
                      .length = task.length};
    for (int64_t t = 0; t < task.length; ++t) {
      sequence.tokens[static_cast<size_t>(t)] = static_cast<int32_t>(draws.Below(vocab_size_));
    }
    const std::vector<int32_t> keys = DrawDistinct(draws, 1, vocab_size_ / 2, task.pairs);
    const std::vector<int32_t> values = DrawDistinct(draws, vocab_size_ / 2, vocab_size_, task.pairs);
    const std::vector<int64_t> gaps = DrawGaps(draws, (task.length - 2 * task.pairs) / 2, task.pairs);
    for (size_t i = 0; i < keys.size(); ++i) {
      sequence.tokens[2 * i] = keys[i], sequence.tokens[2 * i + 1] = values[i];
      const size_t query = static_cast<size_t>(2 * task.pairs + 2 * gaps[i]);
      sequence.tokens[query] = keys[i], sequence.targets[query] = values[i];
    }
    return sequence;
  }

  RecallSpec recall_;
  int64_t seq_len_;
  uint64_t seed_;
  int64_t vocab_size_;
};

}  // namespace

std::unique_ptr<DataSet> MakeRecallDataSet(const DataSpec& spec, uint64_t seed, int64_t vocab_size) {
  ANNULUS_CHECK(!spec.recall->tasks.empty() && spec.recall->train_sequences > 0) << "data.recall.task";
  for (const std::vector<RecallTask>* tasks : {&spec.recall->tasks, &spec.recall->validation_tasks}) {
    for (const auto& [length, pairs] : *tasks) {
      ANNULUS_CHECK(length <= spec.seq_len && pairs > 0 && pairs <= length / 4 && pairs < vocab_size / 2)
          << "length " << length << " pairs " << pairs;
    }
  }
  return std::make_unique<RecallDataSet>(spec, seed, vocab_size);
}

}  // namespace annulus
