// Puts sources, splits, mixing and epochs together. Training sequence n: the mixture says which source it
// comes from and how many of that source came before, k; k / sequences is the epoch, which draws the order
// of the windows and how far their borders move.

#include <algorithm>
#include <cmath>
#include <limits>

#include "annulus/base/hash.h"
#include "annulus/base/random.h"
#include "annulus/train/data.h"
#include "fingerprint.h"
#include "mixture.h"
#include "recall_data_set.h"
#include "section.h"

namespace annulus {
namespace {

// Part of every fingerprint: raise it when the same files and spec start to give other sequences.
constexpr uint64_t kSamplingVersion = 1;

// Validation is read in one fixed pseudo-random order, so that an evaluation of only the first sequences
// samples every source and document alike, and is the same for every seed.
constexpr uint64_t kValidationSeed = 0;

struct Sections {
  std::vector<Section> train;
  std::vector<Section> validation;
};

struct Plan {
  Sections sections;
  Mixture mixture;
  uint64_t seed;
  uint64_t fingerprint;
};

int64_t SumOf(const std::vector<Section>& sections, int64_t (Section::*count)() const) {
  int64_t sum = 0;
  for (const Section& section : sections) sum += (section.*count)();
  return sum;
}

class MixedDataSet final : public DataSet {
 public:
  explicit MixedDataSet(Plan plan)
      : plan_(std::move(plan)),
        validation_sequences_(SumOf(plan_.sections.validation, &Section::sequences)) {}

  absl::StatusOr<Sequence> Train(int64_t sequence) const override {
    if (sequence < 0) return OutOfRange("training", sequence, std::numeric_limits<int64_t>::max());
    const Mixture::Pick pick = plan_.mixture.At(sequence);
    const Section& section = plan_.sections.train[static_cast<size_t>(pick.source)];
    const int64_t epoch = pick.sequence / section.sequences();
    const int64_t place = pick.sequence % section.sequences();
    const Permutation order(static_cast<uint64_t>(section.sequences()), plan_.seed,
                            absl::StrCat("data/order/", pick.source, "/", epoch));
    const RandomStream phases(plan_.seed, absl::StrCat("data/phase/", pick.source));
    return section.Read(static_cast<int64_t>(order(static_cast<uint64_t>(place))),
                        static_cast<int64_t>(phases.Below(static_cast<uint64_t>(epoch),
                                                          static_cast<uint64_t>(section.phases()))));
  }

  absl::StatusOr<Sequence> Validation(int64_t sequence) const override {
    if (sequence < 0 || sequence >= validation_sequences_) {
      return OutOfRange("validation", sequence, validation_sequences_);
    }
    const Permutation order(static_cast<uint64_t>(validation_sequences_), kValidationSeed, "data/validation");
    int64_t index = static_cast<int64_t>(order(static_cast<uint64_t>(sequence)));
    auto section = plan_.sections.validation.begin();
    for (; index >= section->sequences(); ++section) index -= section->sequences();
    return section->Read(index, 0);
  }

  int64_t validation_sequences() const override { return validation_sequences_; }
  int64_t train_tokens() const override { return SumOf(plan_.sections.train, &Section::tokens); }
  int64_t validation_tokens() const override { return SumOf(plan_.sections.validation, &Section::tokens); }
  uint64_t fingerprint() const override { return plan_.fingerprint; }

 private:
  static absl::Status OutOfRange(absl::string_view split, int64_t sequence, int64_t count) {
    return absl::OutOfRangeError(
        absl::StrCat(split, " sequence=", sequence, ": expected at least 0 and below ", count));
  }

  Plan plan_;
  int64_t validation_sequences_;
};

absl::Status CheckSpec(const DataSpec& spec, int64_t vocab_size) {
  if (spec.train.empty() && !spec.recall.has_value())
    return Invalid("data.train: expected at least one source");
  if (spec.seq_len < 1 || spec.seq_len > kMaxSeqLen) {
    return Invalid("data.seq_len=", spec.seq_len, ": expected 1 to ", kMaxSeqLen);
  }
  if (!(spec.validation_fraction >= 0 && spec.validation_fraction < 1)) {
    return Invalid("data.validation_fraction=", spec.validation_fraction, ": expected 0 to below 1");
  }
  if (vocab_size < 1 || vocab_size > std::numeric_limits<int32_t>::max()) {
    return Invalid("vocab_size=", vocab_size, ": expected 1 to ", std::numeric_limits<int32_t>::max());
  }
  return absl::OkStatus();
}

enum class Documents { kNeeded, kUnused };

absl::StatusOr<std::shared_ptr<const IndexedStore>> OpenSource(const SourceSpec& spec, Documents documents) {
  auto store = std::make_shared<IndexedStore>();
  ANNULUS_ASSIGN_OR_RETURN(store->tokens, OpenTokenStore(spec));
  store->documents =
      documents == Documents::kNeeded ? store->tokens->DocumentStarts() : std::vector<int64_t>{0};
  return store;
}

// First token of the validation tail: the start of the document that lies nearest to the exact fraction,
// or exactly there in a source that is one document.
int64_t SplitPoint(const IndexedStore& store, double fraction) {
  const int64_t size = store.tokens->size();
  const int64_t exact = size - std::llround(fraction * static_cast<double>(size));
  if (store.documents.size() < 2) return exact;
  auto after = std::lower_bound(store.documents.begin() + 1, store.documents.end(), exact);
  if (after == store.documents.end()) return store.documents.back();
  if (after == store.documents.begin() + 1) return *after;
  return exact - *(after - 1) <= *after - exact ? *(after - 1) : *after;
}

absl::StatusOr<Sections> OpenSections(const DataSpec& spec, int64_t vocab_size) {
  const bool has_tail = spec.validation.empty() && spec.validation_fraction > 0;
  const bool masked_or_packed = spec.document_mask || spec.packing == Packing::kDocuments;
  SectionOptions options = {.seq_len = spec.seq_len,
                            .vocab_size = vocab_size,
                            .packing = spec.packing,
                            .borders = Borders::kMoving,
                            .document_mask = spec.document_mask,
                            .name = ""};
  SectionOptions validation_options = options;
  validation_options.borders = Borders::kFixed;
  Sections sections;
  for (const SourceSpec& source : spec.train) {
    ANNULUS_ASSIGN_OR_RETURN(
        const std::shared_ptr<const IndexedStore> store,
        OpenSource(source, has_tail || masked_or_packed ? Documents::kNeeded : Documents::kUnused));
    const int64_t size = store->tokens->size();
    const int64_t split = has_tail ? SplitPoint(*store, spec.validation_fraction) : size;
    const std::string of =
        has_tail ? absl::StrCat(" at data.validation_fraction=", spec.validation_fraction, " of ", size) : "";
    options.name = absl::StrCat("training split", of);
    ANNULUS_ASSIGN_OR_RETURN(Section train, Section::Cut(store, {0, split}, options));
    sections.train.push_back(std::move(train));
    if (!has_tail) continue;
    validation_options.name = absl::StrCat("validation split", of);
    ANNULUS_ASSIGN_OR_RETURN(Section tail, Section::Cut(store, {split, size}, validation_options));
    sections.validation.push_back(std::move(tail));
  }
  validation_options.name = "validation source";
  for (const SourceSpec& source : spec.validation) {
    ANNULUS_ASSIGN_OR_RETURN(const std::shared_ptr<const IndexedStore> store,
                             OpenSource(source, masked_or_packed ? Documents::kNeeded : Documents::kUnused));
    ANNULUS_ASSIGN_OR_RETURN(Section section,
                             Section::Cut(store, {0, store->tokens->size()}, validation_options));
    sections.validation.push_back(std::move(section));
  }
  return sections;
}

// Hashes what decides the training sequences, and nothing else: files may move, and validation may change
// between two runs.
uint64_t Fingerprint(const DataSpec& spec, const std::vector<Section>& train, const Mixture& mixture,
                     uint64_t seed) {
  Hasher hasher;
  for (const uint64_t value : {kSamplingVersion, seed, static_cast<uint64_t>(spec.seq_len),
                               static_cast<uint64_t>(spec.document_mask), static_cast<uint64_t>(spec.packing),
                               static_cast<uint64_t>(train.size())}) {
    hasher.UpdateValue(value);
  }
  for (size_t i = 0; i < train.size(); ++i) {
    const SourceSpec& source = spec.train[i];
    hasher.UpdateValue(mixture.slots()[i]);
    hasher.UpdateValue(train[i].range().end);
    hasher.UpdateValue(static_cast<int64_t>(source.format));
    hasher.UpdateValue(source.document_start_token);
    hasher.UpdateValue(static_cast<uint64_t>(source.document_separator.size()));
    hasher.Update(source.document_separator.data(), source.document_separator.size());
    for (const MappedFile* file : train[i].store().files()) AddFile(*file, &hasher);
  }
  return hasher.Digest();
}

}  // namespace

absl::StatusOr<std::unique_ptr<DataSet>> DataSet::Open(const DataSpec& spec, uint64_t seed,
                                                       int64_t vocab_size) {
  ANNULUS_RETURN_IF_ERROR(CheckSpec(spec, vocab_size));
  if (spec.recall.has_value()) return MakeRecallDataSet(spec, seed, vocab_size);
  std::vector<double> weights;
  for (const SourceSpec& source : spec.train) weights.push_back(source.weight);
  ANNULUS_ASSIGN_OR_RETURN(Mixture mixture, Mixture::Create(weights, seed));
  ANNULUS_ASSIGN_OR_RETURN(Sections sections, OpenSections(spec, vocab_size));
  const uint64_t fingerprint = Fingerprint(spec, sections.train, mixture, seed);
  return std::make_unique<MixedDataSet>(Plan{std::move(sections), std::move(mixture), seed, fingerprint});
}

}  // namespace annulus
