#include "section.h"

#include <algorithm>

#include "annulus/base/check.h"

namespace annulus {
namespace {

// First token of each sequence when whole documents are packed in file order: a document that does not
// fit into what is left starts a new sequence, and only one longer than seq_len is cut.
std::vector<int64_t> PackDocuments(const std::vector<int64_t>& documents, TokenRange range, int64_t seq_len) {
  std::vector<int64_t> begins = {range.begin};
  auto next = std::upper_bound(documents.begin(), documents.end(), range.begin);
  for (int64_t document = range.begin; document < range.end;) {
    const int64_t end = next == documents.end() ? range.end : std::min(*next++, range.end);
    if (end - begins.back() > seq_len && document > begins.back()) begins.push_back(document);
    while (end - begins.back() > seq_len) begins.push_back(begins.back() + seq_len);
    document = end;
  }
  return begins;
}

}  // namespace

absl::StatusOr<Section> Section::Cut(std::shared_ptr<const IndexedStore> store, TokenRange range,
                                     const SectionOptions& options) {
  const int64_t seq_len = options.seq_len;
  const bool stream = options.packing == Packing::kStream;
  const int64_t smallest = stream ? seq_len + 1 : 2;
  if (range.size() < smallest) {
    return Invalid(store->tokens->path(), ": tokens=", range.size(), " in the ", options.name,
                   ": expected at least ", smallest,
                   stream ? " (data.seq_len + 1)" : " (a token and its target)");
  }
  Section section(std::move(store), range, options);
  if (!stream) {
    section.begins_ = PackDocuments(section.store_->documents, range, seq_len);
    section.sequences_ = static_cast<int64_t>(section.begins_.size());
  } else if (options.borders == Borders::kFixed) {
    section.sequences_ = (range.size() - 1) / seq_len;
  } else {
    section.sequences_ = std::max<int64_t>(1, range.size() / seq_len - 1);
    section.phases_ = range.size() - section.sequences_ * seq_len;
  }
  return section;
}

absl::StatusOr<Sequence> Section::Read(int64_t index, int64_t phase) const {
  ANNULUS_CHECK(index >= 0 && index < sequences_) << "sequence " << index << " of " << sequences_;
  ANNULUS_CHECK(phase >= 0 && phase < phases_) << "phase " << phase << " of " << phases_;
  const TokenRange positions = Positions(index, phase);
  const size_t seq_len = static_cast<size_t>(options_.seq_len);
  const size_t length = static_cast<size_t>(positions.size());

  // One token more than positions, the last target, unless the range ends here.
  std::vector<int64_t> tokens(static_cast<size_t>(std::min(positions.end + 1, range_.end) - positions.begin));
  for (const MappedFile* file : store().files()) ANNULUS_RETURN_IF_ERROR(file->CheckWhole());
  store().Read(positions.begin, absl::MakeSpan(tokens));
  ANNULUS_RETURN_IF_ERROR(CheckVocabulary(positions.begin, tokens));

  Sequence sequence;
  sequence.length = positions.size();
  sequence.tokens.assign(seq_len, 0);
  sequence.targets.assign(seq_len, kIgnoredTarget);
  sequence.document_starts.assign(seq_len, 0);
  for (size_t i = 0; i < length; ++i) sequence.tokens[i] = static_cast<int32_t>(tokens[i]);
  for (size_t i = 0; i + 1 < tokens.size(); ++i) sequence.targets[i] = static_cast<int32_t>(tokens[i + 1]);
  if (options_.document_mask) MarkDocuments(positions.begin, &sequence);
  return sequence;
}

TokenRange Section::Positions(int64_t index, int64_t phase) const {
  if (options_.packing == Packing::kStream) {
    const int64_t begin = range_.begin + phase + index * options_.seq_len;
    return {begin, begin + options_.seq_len};
  }
  const size_t i = static_cast<size_t>(index);
  return {begins_[i], i + 1 < begins_.size() ? begins_[i + 1] : range_.end};
}

absl::Status Section::CheckVocabulary(int64_t begin, absl::Span<const int64_t> tokens) const {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] >= 0 && tokens[i] < options_.vocab_size) continue;
    return absl::OutOfRangeError(absl::StrCat(store().path(), ": token[", begin + static_cast<int64_t>(i),
                                              "]=", tokens[i], ": expected 0 to ", options_.vocab_size - 1,
                                              ", as the vocabulary has ", options_.vocab_size));
  }
  return absl::OkStatus();
}

// Fills document_starts and drops the targets that are the first token of the next document. A document
// that began before the sequence starts at position 0; padding counts as a document of its own.
void Section::MarkDocuments(int64_t begin, Sequence* sequence) const {
  const std::vector<int64_t>& documents = store_->documents;
  auto next = std::upper_bound(documents.begin(), documents.end(), begin);
  int64_t start = 0;
  for (int64_t i = 0; i < sequence->length; ++i) {
    const size_t at = static_cast<size_t>(i);
    if (next != documents.end() && *next == begin + i) {
      start = i;
      ++next;
    }
    sequence->document_starts[at] = start;
    if (next != documents.end() && *next == begin + i + 1) sequence->targets[at] = kIgnoredTarget;
  }
  std::fill(sequence->document_starts.begin() + sequence->length, sequence->document_starts.end(),
            sequence->length);
}

}  // namespace annulus
