#pragma once

// Checkpoints of logical tensors with global shapes, so that any layout reads what any other wrote.
//
//   <directory>/step-00000500/manifest.json         what is in it: files with size and hash, tensors, meta
//                             shard-00000.safetensors ...  one file per writing rank
//                             COMMIT                hash of the manifest; written last
//   <directory>/LATEST                              name of the newest committed step
//
// A save goes to <directory>/.tmp-step-00000500: files are written, synced and hashed; the manifest and
// COMMIT follow; the directory is renamed, the parent synced, LATEST replaced by rename; only then are older
// steps deleted, their COMMIT first. A crash at any point leaves the previous checkpoints whole and readable.
//
// A step directory without COMMIT is being deleted and counts for nothing. Saving a step that exists replaces
// it: the old one is renamed to step-00000500.old once the new one is complete, and counts as that step until
// the new one is in its place. All ranks need the same file system; only one job at a time may save into a
// directory.

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "annulus/comm/communicator.h"
#include "annulus/train/safetensors.h"

namespace annulus {

struct CheckpointMeta {
  int64_t step = 0;                // optimizer steps done
  int64_t consumed_sequences = 0;  // training sequences seen
  uint64_t seed = 0;
  uint64_t data_fingerprint = 0;
  std::string model_fingerprint;  // names, shapes and dtypes of all parameters, readable
  std::string config;             // resolved configuration text
};

// Writes checkpoint `meta.step` into `directory` together with all ranks of `world`. `tensors` are the
// logical tensors that this rank writes; every tensor is written by exactly one rank. Afterwards keeps the
// newest `keep` committed checkpoints up to this step; later steps, left by a run that was continued from an
// earlier one, stay until the run has passed them. On an error every rank returns it, and the newest
// checkpoint is still whole.
absl::Status SaveCheckpoint(Communicator& world, const std::string& directory, const CheckpointMeta& meta,
                            std::vector<NamedTensor> tensors, int64_t keep);

class Checkpoint {
 public:
  // Opens `path`: a step directory, or a directory of steps of which the newest committed one is taken: the
  // one that LATEST names, else the highest step. Verifies COMMIT, manifest, file sizes, every file's hash,
  // and that manifest and headers agree on tensors. NotFound if there is no committed checkpoint; DataLoss
  // names the file that is damaged or missing, and other committed steps, which are only taken when `path`
  // names them.
  static absl::StatusOr<Checkpoint> Open(const std::string& path);
  // The same on every rank of `world`, each verifying a part of the files; all ranks get the same Status.
  static absl::StatusOr<Checkpoint> Open(Communicator& world, const std::string& path);

  const CheckpointMeta& meta() const { return meta_; }
  const std::string& path() const { return path_; }
  std::vector<std::string> tensor_names() const;                      // sorted
  absl::StatusOr<ConstTensorRef> Find(absl::string_view name) const;  // mapped; data may be unaligned

 private:
  // Opens one step directory and verifies the hashes of every `parts`-th file, from `part` on.
  static absl::StatusOr<Checkpoint> OpenStep(const std::string& path, int part, int parts);

  std::string path_;
  CheckpointMeta meta_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, ConstTensorRef, std::less<>> tensors_;
};

}  // namespace annulus
