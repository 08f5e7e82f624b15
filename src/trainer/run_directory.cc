#include "run_directory.h"

#include <unistd.h>

#include <ctime>
#include <map>
#include <nlohmann/json.hpp>

#include "absl/strings/str_format.h"
#include "annulus/base/file.h"
#include "annulus/base/hash.h"
#include "annulus/base/host.h"

namespace annulus {
namespace {

std::string NewRunPath(const ResolvedConfig& config) {
  const std::string salt = absl::StrCat(config.text, getpid(), UtcNow("%s"));
  return absl::StrCat(config.spec.runs_dir, "/", config.spec.name, "-", UtcNow("%Y%m%d-%H%M%S"), "-",
                      Hex64(Hash64(salt)).substr(0, 6));
}

// Rank 0's part of Open.
absl::Status Prepare(StartFrom start, RunDirectory* directory) {
  const std::string& path = directory->path;
  const bool holds_run = Exists(path + "/metrics.jsonl");
  if (start == StartFrom::kLatestCheckpoint && !holds_run) {
    return absl::NotFoundError(
        absl::StrCat("--run_dir=", path, ": expected the directory of an earlier run to resume"));
  }
  if (start == StartFrom::kScratch && holds_run) {
    return Invalid("--run_dir=", path,
                   ": already holds a run; expected a new directory, or --resume to go on with it");
  }
  ANNULUS_RETURN_IF_ERROR(MakeDirectories(path + "/logs"));
  ANNULUS_RETURN_IF_ERROR(MakeDirectories(path + "/ckpt"));
  absl::StatusOr<FileLock> lock =
      FileLock::Take(path + "/lock", absl::StrCat("a run, pid ", getpid(), " on ", HostName()));
  ANNULUS_RETURN_IF_ERROR(Prefixed(lock.status(), "--run_dir: expected no other job in it: "));
  directory->lock = std::make_shared<FileLock>(*std::move(lock));
  ANNULUS_ASSIGN_OR_RETURN(LineFile metrics, LineFile::Append(path + "/metrics.jsonl"));  // it marks a run
  return metrics.Write("");
}

}  // namespace

std::string UtcNow(const char* format) {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[64];
  return std::string(text, std::strftime(text, sizeof(text), format, &utc));
}

absl::StatusOr<LineFile> LineFile::Append(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "ae");
  if (file == nullptr) return FileError("open for appending", path);
  return LineFile(path, file);
}

absl::Status LineFile::Write(absl::string_view text) {
  const bool written = std::fwrite(text.data(), 1, text.size(), file_.get()) == text.size();
  if (!written || std::fflush(file_.get()) != 0) return FileError("write", path_);
  return absl::OkStatus();
}

absl::StatusOr<RunDirectory> RunDirectory::Open(Communicator& world, const ResolvedConfig& config,
                                                const RunOptions& options) {
  if (options.start == StartFrom::kLatestCheckpoint && options.run_dir.empty()) {
    return world.AgreeOk(Invalid("--resume: expected --run_dir DIR, the directory of the run to go on with"));
  }
  ANNULUS_ASSIGN_OR_RETURN(
      std::string path,
      world.BroadcastString(options.run_dir.empty() ? NewRunPath(config) : options.run_dir, 0));
  RunDirectory directory{.path = path, .lock = nullptr};
  absl::Status status = world.rank() == 0 ? Prepare(options.start, &directory) : absl::OkStatus();
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(status));
  return directory;
}

absl::Status RunDirectory::Describe(const ResolvedConfig& config, const RunOptions& options,
                                    const std::vector<std::string>& devices) const {
  ANNULUS_RETURN_IF_ERROR(WriteFileAtomically(path + "/config.resolved.textproto", config.text));
  ANNULUS_RETURN_IF_ERROR(WriteFileAtomically(path + "/command.txt", options.command + "\n"));
  nlohmann::ordered_json env;
  env["time"] = UtcNow("%Y-%m-%dT%H:%M:%SZ");
  env["host"] = HostName();
  env["ranks"] = devices.size();
  std::map<std::string, int> ranks_by_device;
  for (const std::string& device : devices) ++ranks_by_device[device];
  env["devices"] = ranks_by_device;
  env["compiler"] = __VERSION__;
  for (const char* name : {"OMPI_ARGV", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"}) {
    if (const char* value = std::getenv(name)) env["environment"][name] = value;
  }
  return WriteFileAtomically(path + "/env.json", env.dump(2) + "\n");
}

absl::Status RunDirectory::TrimMetrics(int64_t step) const {
  const std::string file = path + "/metrics.jsonl";
  ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(file));
  std::string kept;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    if (end == std::string::npos) break;  // torn by a crash
    const std::string line = text.substr(begin, end - begin + 1);
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (json.is_object() && json.contains("step") && json["step"].is_number_integer() &&
        json["step"].get<int64_t>() <= step) {
      kept += line;
    }
    begin = end + 1;
  }
  return WriteFileAtomically(file, kept);
}

absl::Status RunDirectory::Event(absl::string_view event, int64_t step, absl::string_view detail) const {
  nlohmann::ordered_json json;
  json["time"] = UtcNow("%Y-%m-%dT%H:%M:%SZ");
  json["event"] = std::string(event);
  json["step"] = step;
  json["detail"] = std::string(detail);
  ANNULUS_ASSIGN_OR_RETURN(LineFile file, LineFile::Append(path + "/events.jsonl"));
  return file.Write(json.dump() + "\n");
}

}  // namespace annulus
