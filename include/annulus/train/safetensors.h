#pragma once

// The safetensors format (Hugging Face): u64 header length, JSON header, raw little-endian data.
// Reading accepts only what the format's own validator accepts: ranges sorted, contiguous, without holes,
// of the size their dtype and shape say, and ending at the end of the file.

#include <map>
#include <string>
#include <vector>

#include "annulus/base/file.h"
#include "annulus/device/tensor.h"

namespace annulus {

struct NamedTensor {
  std::string name;
  ConstTensorRef tensor;  // on the CPU
};

struct WrittenFile {
  int64_t bytes = 0;
  uint64_t hash = 0;  // XXH3-64 of the whole file
};

// Writes and fsyncs. Tensors are laid out by dtype size descending, then name, as other writers do.
absl::StatusOr<WrittenFile> WriteSafetensors(const std::string& path, std::vector<NamedTensor> tensors,
                                             const std::map<std::string, std::string>& metadata);

class SafetensorsFile {
 public:
  // Errors name the file and what is wrong with which tensor. The data is mapped, not read.
  static absl::StatusOr<SafetensorsFile> Open(const std::string& path);
  static absl::StatusOr<SafetensorsFile> Open(MappedFile file);
  // The same for bytes in memory; `name` stands for the path in errors. `bytes` must outlive the result.
  static absl::StatusOr<SafetensorsFile> Parse(absl::string_view name, absl::Span<const uint8_t> bytes);

  // Sorted by name; data may be unaligned.
  const std::vector<NamedTensor>& tensors() const { return tensors_; }
  absl::StatusOr<ConstTensorRef> Find(absl::string_view name) const;  // NotFound names file and tensor
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  absl::Span<const uint8_t> bytes() const { return bytes_; }

 private:
  std::string name_;
  MappedFile file_;
  absl::Span<const uint8_t> bytes_;
  std::vector<NamedTensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace annulus
