#pragma once

// The files of a run: <dir>/{config.resolved.textproto, command.txt, env.json, metrics.jsonl, events.jsonl,
// logs/rank-00000.log, ckpt/}. Rank 0 writes all but the logs.

#include <cstdio>
#include <memory>
#include <string>

#include "annulus/base/file.h"
#include "annulus/comm/communicator.h"
#include "annulus/train/run.h"

namespace annulus {

// Appends lines; every line reaches the file system at once.
class LineFile {
 public:
  static absl::StatusOr<LineFile> Append(const std::string& path);
  absl::Status Write(absl::string_view text);  // text ends its own lines

 private:
  LineFile(std::string path, std::FILE* file) : path_(std::move(path)), file_(file, &std::fclose) {}
  std::string path_;
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_;
};

struct RunDirectory {
  std::string path;
  std::shared_ptr<FileLock> lock;  // rank 0: two jobs in one directory would undo each other's saves
  std::string checkpoints() const { return path + "/ckpt"; }

  // Makes or reopens the directory; collective, the same answer on every rank. A directory that already holds
  // a run is refused unless options.start is kLatestCheckpoint, which in turn needs one that exists.
  static absl::StatusOr<RunDirectory> Open(Communicator& world, const ResolvedConfig& config,
                                           const RunOptions& options);

  // Writes config.resolved.textproto, command.txt and env.json. Rank 0, once the run is known to start: a
  // resume that is refused changes nothing. `devices`: DeviceName of each rank's.
  absl::Status Describe(const ResolvedConfig& config, const RunOptions& options,
                        const std::vector<std::string>& devices) const;
  // Drops lines of metrics.jsonl of steps after `step`, which a resumed run will write again. Rank 0.
  absl::Status TrimMetrics(int64_t step) const;
  // Adds {"time", "event", "step", "detail"} to events.jsonl. Rank 0.
  absl::Status Event(absl::string_view event, int64_t step, absl::string_view detail) const;
};

std::string UtcNow(const char* format);  // strftime format

}  // namespace annulus
