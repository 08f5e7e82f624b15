#pragma once

// A contiguous token range of one store (its training or its validation part), cut into sequences of
// seq_len positions.
//
//   kStream, seq_len 4, phase 1          | range: 0 1 2 3 4 5 6 7 8 9 ...
//     sequence 0: tokens 1..4, targets 2..5;  sequence 1: tokens 5..8, targets 6..9
//   kDocuments, documents [0 1 2] [3] [4 5 6 7 8 9]
//     sequence 0: 0 1 2 3;  1: 4 5 6 7 (cut);  2: 8 9 and two positions of padding
//
// No token or target lies outside of the range, so training never sees a validation token.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "annulus/train/data.h"
#include "token_store.h"

namespace annulus {

// A store and, where documents matter, the positions at which they start ({0} elsewhere).
struct IndexedStore {
  std::unique_ptr<TokenStore> tokens;
  std::vector<int64_t> documents;
};

struct TokenRange {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
};

enum class Borders {
  kFixed,   // every whole window from the start of the range
  kMoving,  // one window fewer, so that all can be moved by seq_len tokens or more: over the epochs, borders
            // fall everywhere and no token at the end of the range stays unseen
};

struct SectionOptions {
  int64_t seq_len = 0;
  int64_t vocab_size = 0;
  Packing packing = Packing::kStream;
  Borders borders = Borders::kFixed;
  bool document_mask = false;
  std::string name;  // for messages, e.g. "training split"
};

class Section {
 public:
  // InvalidArgument where the range is too small for one sequence.
  static absl::StatusOr<Section> Cut(std::shared_ptr<const IndexedStore> store, TokenRange range,
                                     const SectionOptions& options);

  int64_t tokens() const { return range_.size(); }
  TokenRange range() const { return range_; }
  const TokenStore& store() const { return *store_->tokens; }
  // Sequences of one pass over the range; at least 1.
  int64_t sequences() const { return sequences_; }
  // Number of ways to place the borders; 1 unless they are moving.
  int64_t phases() const { return phases_; }

  // Sequence `index` in [0, sequences()) with every border `phase` tokens later, phase in [0, phases()).
  absl::StatusOr<Sequence> Read(int64_t index, int64_t phase) const;

 private:
  Section(std::shared_ptr<const IndexedStore> store, TokenRange range, const SectionOptions& options)
      : store_(std::move(store)), range_(range), options_(options) {}

  TokenRange Positions(int64_t index, int64_t phase) const;
  absl::Status CheckVocabulary(int64_t begin, absl::Span<const int64_t> tokens) const;
  void MarkDocuments(int64_t begin, Sequence* sequence) const;

  std::shared_ptr<const IndexedStore> store_;
  TokenRange range_;
  SectionOptions options_;
  int64_t sequences_ = 0;
  int64_t phases_ = 1;
  std::vector<int64_t> begins_;  // kDocuments: first token of each sequence; the next one's is its end
};

}  // namespace annulus
