#pragma once

// Training and validation sequences. What sequence number n holds is a function of (data, spec, seed, n):
// it depends on neither the world size nor what was read before, so any step can be resumed.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "annulus/base/status.h"
#include "annulus/train/spec.h"

namespace annulus {

inline constexpr int32_t kIgnoredTarget = -1;

// One sequence of seq_len positions; all vectors have that length.
struct Sequence {
  std::vector<int32_t> tokens;
  std::vector<int32_t> targets;          // next token; kIgnoredTarget where it is not counted
  std::vector<int64_t> document_starts;  // position at which the token's document starts (0 without a mask)
  int64_t length = 0;  // tokens [length, seq_len) are padding: never attended, never counted
};

// One opened set of sources with its splits. Thread-compatible; reads are from memory maps.
class DataSet {
 public:
  virtual ~DataSet() = default;

  // Opens and checks every source (sizes, headers, index consistency). Errors name file, field and value.
  static absl::StatusOr<std::unique_ptr<DataSet>> Open(const DataSpec& spec, uint64_t seed,
                                                       int64_t vocab_size);

  // Training sequence number `sequence` (global over the run: step * sequences_per_step + index).
  // Every window of a source is seen once per epoch, in an order that depends on (seed, epoch).
  // OutOfRange names file, position, token and vocabulary for a token outside [0, vocab_size).
  virtual absl::StatusOr<Sequence> Train(int64_t sequence) const = 0;

  // One pass over the validation parts, each window once, in one pseudo-random order that is the same for
  // every seed: the first few sequences sample all sources. Weights do not apply.
  virtual int64_t validation_sequences() const = 0;
  virtual absl::StatusOr<Sequence> Validation(int64_t sequence) const = 0;

  virtual int64_t train_tokens() const = 0;
  virtual int64_t validation_tokens() const = 0;

  // Changes whenever what Train returns could change: sizes and sampled contents of the files, spec, seed.
  // Paths and validation sources do not count: files may move between two runs.
  virtual uint64_t fingerprint() const = 0;
};

}  // namespace annulus
