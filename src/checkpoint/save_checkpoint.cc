#include <filesystem>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "annulus/base/file.h"
#include "annulus/train/checkpoint.h"
#include "manifest.h"
#include "step_directory.h"

namespace annulus {
namespace {

struct SavePaths {
  std::string directory;
  std::string step;       // where the checkpoint ends up
  std::string temporary;  // where it is written
};

absl::Status CheckArguments(const std::string& directory, const CheckpointMeta& meta, int64_t keep) {
  if (directory.empty()) return Invalid("checkpoint directory: expected a path");
  if (meta.step < 0) return Invalid("step=", meta.step, ": expected at least 0");
  if (meta.consumed_sequences < 0)
    return Invalid("consumed_sequences=", meta.consumed_sequences, ": expected at least 0");
  if (keep < 1) return Invalid("checkpoint.keep=", keep, ": expected at least 1");
  return absl::OkStatus();
}

absl::Status Prepare(const SavePaths& paths) {
  if (!Exists(paths.directory)) {
    ANNULUS_RETURN_IF_ERROR(MakeDirectories(paths.directory));
    ANNULUS_RETURN_IF_ERROR(SyncDirectory(JoinPath(paths.directory, "..")));
  }
  ANNULUS_RETURN_IF_ERROR(RemoveLeftovers(paths.directory));
  return MakeDirectories(paths.temporary);
}

// Returns the file's manifest entry; empty for a rank without tensors, which writes no file.
absl::StatusOr<std::string> WriteShard(const SavePaths& paths, int world_rank, int64_t step,
                                       std::vector<NamedTensor> tensors) {
  if (tensors.empty()) return std::string();
  ManifestFile file{.name = ShardName(world_rank), .tensors = Describe(tensors)};
  ANNULUS_ASSIGN_OR_RETURN(const WrittenFile written,
                           WriteSafetensors(JoinPath(paths.temporary, file.name), std::move(tensors),
                                            {{"annulus_step", absl::StrCat(step)}}));
  file.bytes = written.bytes;
  file.hash = written.hash;
  return FileToText(file);
}

// Ranks on hosts that do not share the directory each write happily into their own.
absl::Status CheckVisible(const SavePaths& paths, const ManifestFile& file) {
  const std::string path = JoinPath(paths.temporary, file.name);
  std::error_code error;
  const uintmax_t bytes = std::filesystem::file_size(path, error);
  if (!error && bytes == static_cast<uintmax_t>(file.bytes)) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(path, ": rank 0 does not see the ", file.bytes, " bytes that its rank wrote (",
                   error ? error.message() : absl::StrCat(bytes, " bytes"),
                   "): expected a directory on a file ", "system that all ranks share"));
}

absl::Status WriteManifest(const SavePaths& paths, const CheckpointMeta& meta,
                           const std::vector<std::string>& shards) {
  Manifest manifest{.meta = meta, .files = {}};
  for (const std::string& shard : shards) {
    if (shard.empty()) continue;
    ANNULUS_ASSIGN_OR_RETURN(manifest.files.emplace_back(), FileFromText(shard));
    ANNULUS_RETURN_IF_ERROR(CheckVisible(paths, manifest.files.back()));
  }
  ANNULUS_ASSIGN_OR_RETURN(const std::string text, ManifestToText(manifest));
  ANNULUS_RETURN_IF_ERROR(WriteFileDurably(JoinPath(paths.temporary, kManifestName), text));
  // COMMIT vouches for everything before it, names included, so those are durable first.
  ANNULUS_RETURN_IF_ERROR(SyncDirectory(paths.temporary));
  ANNULUS_RETURN_IF_ERROR(WriteFileDurably(JoinPath(paths.temporary, kCommitName), CommitText(text)));
  return SyncDirectory(paths.temporary);
}

absl::Status PutInPlace(const SavePaths& paths) {
  const std::string replaced = paths.step + kReplacedSuffix;
  const bool replaces = Exists(paths.step);
  if (replaces) ANNULUS_RETURN_IF_ERROR(Rename(paths.step, replaced));
  if (absl::Status status = Rename(paths.temporary, paths.step); !status.ok()) {
    if (replaces)
      Rename(replaced, paths.step).IgnoreError();  // if this fails too, readers know the .old name
    return status;
  }
  return SyncDirectory(paths.directory);
}

absl::Status Commit(const SavePaths& paths, const CheckpointMeta& meta,
                    const std::vector<std::string>& shards) {
  ANNULUS_RETURN_IF_ERROR(WriteManifest(paths, meta, shards));
  // LATEST's new contents are written before the step becomes visible: a full disk then fails the whole save
  // instead of leaving a committed step that LATEST does not name.
  const std::string next_latest = JoinPath(paths.directory, kNextLatestName);
  ANNULUS_RETURN_IF_ERROR(WriteFileDurably(next_latest, StepName(meta.step) + "\n"));
  ANNULUS_RETURN_IF_ERROR(PutInPlace(paths));
  ANNULUS_RETURN_IF_ERROR(Rename(next_latest, JoinPath(paths.directory, kLatestName)));
  return SyncDirectory(paths.directory);
}

absl::Status WriteAndCommit(Communicator& world, const SavePaths& paths, const CheckpointMeta& meta,
                            std::vector<NamedTensor> tensors, int64_t keep) {
  absl::Status status = CheckArguments(paths.directory, meta, keep);
  if (status.ok() && world.rank() == 0) status = Prepare(paths);
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(status));

  const absl::StatusOr<std::string> shard = WriteShard(paths, world.rank(), meta.step, std::move(tensors));
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(shard.status()));
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<std::string> shards, world.AllGatherStrings(*shard));

  return world.AgreeOk(world.rank() == 0 ? Commit(paths, meta, shards) : absl::OkStatus());
}

// Deletes all but the newest `keep` committed steps up to `step`.
absl::Status Prune(const SavePaths& paths, int64_t step, int64_t keep) {
  ANNULUS_RETURN_IF_ERROR(RemoveStep(paths.step + kReplacedSuffix));
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<StepDirectory> steps, ListSteps(paths.directory));
  int64_t kept = 0;
  for (auto entry = steps.rbegin(); entry != steps.rend(); ++entry) {
    if (entry->step > step) continue;
    if (entry->committed && kept++ < keep) continue;
    ANNULUS_RETURN_IF_ERROR(RemoveStep(entry->path));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status SaveCheckpoint(Communicator& world, const std::string& directory, const CheckpointMeta& meta,
                            std::vector<NamedTensor> tensors, int64_t keep) {
  const SavePaths paths{.directory = directory,
                        .step = JoinPath(directory, StepName(meta.step)),
                        .temporary = JoinPath(directory, kTemporaryPrefix + StepName(meta.step))};
  const absl::Status status = WriteAndCommit(world, paths, meta, std::move(tensors), keep);
  if (!status.ok()) {
    if (world.rank() == 0) {  // best effort: gives the space back, and the next save tries again
      RemoveAll(paths.temporary).IgnoreError();
      RemoveAll(JoinPath(directory, kNextLatestName)).IgnoreError();
    }
    return status;
  }
  absl::Status pruned;
  if (world.rank() == 0)
    pruned = Prefixed(Prune(paths, meta.step, keep),
                      absl::StrCat(paths.step, " is saved, but an older one could not be deleted: "));
  return world.AgreeOk(pruned);
}

}  // namespace annulus
