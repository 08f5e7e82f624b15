// The micro-batch that stands for all of a run's.

#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"
#include "annulus/model/decoder.h"
#include "annulus/train/data.h"
#include "step_cost_exchange.h"

namespace annulus {
namespace {

// Micro-batches that are looked at, as far as they have not more tokens.
constexpr int64_t kMicroBatches = 16, kTokens = int64_t{1} << 22;

absl::StatusOr<std::vector<SequenceBatch>> FirstBatches(const RunSpec& spec) {
  ANNULUS_ASSIGN_OR_RETURN(const std::unique_ptr<DataSet> data,
                           DataSet::Open(spec.data, spec.seed, spec.model.vocab_size));
  const int64_t size = spec.optim.micro_batch;
  const int64_t count = std::clamp<int64_t>(kTokens / (size * spec.data.seq_len), 1, kMicroBatches);
  std::vector<SequenceBatch> batches;
  for (int64_t i = 0; i < count * size; ++i) {
    if (i % size == 0) batches.push_back({.batch = size, .lengths = {}, .document_starts = {}});
    ANNULUS_ASSIGN_OR_RETURN(Sequence sequence, data->Train(i));
    batches.back().lengths.push_back(sequence.length);
    batches.back().document_starts.push_back(std::move(sequence.document_starts));
  }
  return batches;
}

}  // namespace

SequenceBatch WholeSequences(const RunSpec& spec) {
  const std::vector<int64_t> lengths(static_cast<size_t>(spec.optim.micro_batch), spec.data.seq_len);
  return WithMetaTokens(spec.model,
                        {.batch = spec.optim.micro_batch, .lengths = lengths, .document_starts = {}});
}

PricedBatch TypicalBatch(const RunSpec& spec) {
  PricedBatch priced{.sequences = WholeSequences(spec), .note = ""};
  if (!spec.data.document_mask) return priced;
  absl::StatusOr<std::vector<SequenceBatch>> batches = FirstBatches(spec);
  if (!batches.ok()) {
    priced.note =
        absl::StrCat("documents priced as whole sequences: ", std::string(batches.status().message()));
    return priced;
  }
  std::vector<double> pairs;
  double mean = 0;
  for (SequenceBatch& batch : *batches) {
    batch = WithMetaTokens(spec.model, std::move(batch));
    pairs.push_back(static_cast<double>(VisiblePairs(batch, 0)));
    mean += pairs.back() / static_cast<double>(batches->size());
  }
  const auto typical = std::min_element(pairs.begin(), pairs.end(), [mean](double a, double b) {
    return std::abs(a - mean) < std::abs(b - mean);
  });
  const double whole = static_cast<double>(VisiblePairs(priced.sequences, 0));
  priced.sequences = std::move((*batches)[static_cast<size_t>(typical - pairs.begin())]);
  priced.note = absl::StrFormat("documents as in the data: %.1f%% of the pairs of whole sequences",
                                100 * *typical / whole);
  return priced;
}

}  // namespace annulus
