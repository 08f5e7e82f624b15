#pragma once

// One source of tokens on disk: a memory-mapped sequence of ids with document borders. Opening checks
// every header field against the file sizes, so reads inside [0, size()) cannot fail.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "annulus/base/file.h"
#include "annulus/base/status.h"
#include "annulus/train/spec.h"

namespace annulus {

class TokenStore {
 public:
  virtual ~TokenStore() = default;

  // Number of tokens.
  virtual int64_t size() const = 0;
  // out[i] = token begin + i, as stored: it may lie outside of any vocabulary. Inside [0, size()).
  virtual void Read(int64_t begin, absl::Span<int64_t> out) const = 0;
  // Token positions at which documents start: 0 and then strictly increasing, below size(). Text and
  // llm.c files are scanned as a whole, so call it once and only where documents matter.
  virtual std::vector<int64_t> DocumentStarts() const = 0;
  // The file that holds the tokens; errors about a token name it.
  virtual const std::string& path() const = 0;
  // Every file behind the store, for the fingerprint.
  virtual std::vector<const MappedFile*> files() const = 0;
};

absl::StatusOr<std::unique_ptr<TokenStore>> OpenTokenStore(const SourceSpec& spec);

// The formats. Each is one file of this folder; what they look like on disk is described there.
absl::StatusOr<std::unique_ptr<TokenStore>> OpenTextStore(const SourceSpec& spec);
absl::StatusOr<std::unique_ptr<TokenStore>> OpenMegatronStore(const SourceSpec& spec);
absl::StatusOr<std::unique_ptr<TokenStore>> OpenLlmCStore(const SourceSpec& spec);

}  // namespace annulus
