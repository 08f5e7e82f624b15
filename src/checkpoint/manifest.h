#pragma once

// manifest.json of a checkpoint: what the run was at, and every file with its size, hash and tensors.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "annulus/base/status.h"
#include "annulus/train/checkpoint.h"
#include "tensor_entry.h"

namespace annulus {

struct ManifestTensor {
  std::string name;
  TensorType type;
  friend bool operator==(const ManifestTensor&, const ManifestTensor&) = default;
};

struct ManifestFile {
  std::string name;  // shard-00000.safetensors
  int64_t bytes = 0;
  uint64_t hash = 0;
  std::vector<ManifestTensor> tensors;  // sorted by name
};

struct Manifest {
  CheckpointMeta meta;
  std::vector<ManifestFile> files;
};

std::string ShardName(int world_rank);
std::vector<ManifestTensor> Describe(const std::vector<NamedTensor>& tensors);

// One file's entry alone, as ranks send it to the rank that writes the manifest.
absl::StatusOr<std::string> FileToText(const ManifestFile& file);
absl::StatusOr<ManifestFile> FileFromText(absl::string_view text);

absl::StatusOr<std::string> ManifestToText(const Manifest& manifest);
// Refuses file names that are not those of shards, and files or tensors that appear twice. `path` is for
// errors.
absl::StatusOr<Manifest> ManifestFromText(absl::string_view path, absl::string_view text);

}  // namespace annulus
