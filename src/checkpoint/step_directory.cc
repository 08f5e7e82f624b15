#include "step_directory.h"

#include <algorithm>
#include <map>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "annulus/base/file.h"
#include "annulus/base/hash.h"

namespace annulus {
namespace {

constexpr absl::string_view kStepPrefix = "step-";

bool IsCommitted(const std::string& step_path) { return Exists(JoinPath(step_path, kCommitName)); }

absl::Status SettleReplacement(const std::string& directory, absl::string_view name) {
  const std::string path = JoinPath(directory, name), replaced = path + kReplacedSuffix;
  if (IsCommitted(path) || !IsCommitted(replaced)) return RemoveStep(replaced);
  ANNULUS_RETURN_IF_ERROR(RemoveAll(path));
  ANNULUS_RETURN_IF_ERROR(Rename(replaced, path));
  return SyncDirectory(directory);
}

}  // namespace

std::string JoinPath(absl::string_view directory, absl::string_view name) {
  return absl::StrCat(directory, absl::EndsWith(directory, "/") ? "" : "/", name);
}

std::string StepName(int64_t step) { return absl::StrFormat("%s%08d", kStepPrefix, step); }

std::optional<int64_t> StepFromName(absl::string_view name) {
  int64_t step = 0;
  absl::string_view digits = name;
  if (!absl::ConsumePrefix(&digits, kStepPrefix) || !absl::SimpleAtoi(digits, &step)) return std::nullopt;
  if (step < 0 || StepName(step) != name) return std::nullopt;
  return step;
}

std::string CommitText(absl::string_view manifest_text) { return Hex64(Hash64(manifest_text)) + "\n"; }

absl::StatusOr<std::vector<StepDirectory>> ListSteps(const std::string& directory) {
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(directory));
  std::map<int64_t, StepDirectory> steps;
  for (absl::string_view name : names) {  // sorted: step-N comes before step-N.old
    const std::string path = JoinPath(directory, name);
    absl::ConsumeSuffix(&name, kReplacedSuffix);
    const std::optional<int64_t> step = StepFromName(name);
    if (!step.has_value()) continue;
    StepDirectory& entry = steps[*step];
    if (entry.path.empty() || !entry.committed) entry = {*step, path, IsCommitted(path)};
  }
  std::vector<StepDirectory> list;
  for (const auto& [step, entry] : steps) list.push_back(entry);
  return list;
}

absl::Status RemoveStep(const std::string& path) {
  if (IsCommitted(path)) {
    ANNULUS_RETURN_IF_ERROR(RemoveAll(JoinPath(path, kCommitName)));
    ANNULUS_RETURN_IF_ERROR(SyncDirectory(path));
  }
  return RemoveAll(path);
}

absl::Status RemoveLeftovers(const std::string& directory) {
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(directory));
  for (absl::string_view name : names) {
    if (absl::StartsWith(name, kTemporaryPrefix) || name == kNextLatestName) {
      ANNULUS_RETURN_IF_ERROR(RemoveAll(JoinPath(directory, name)));
    } else if (absl::ConsumeSuffix(&name, kReplacedSuffix) && StepFromName(name).has_value()) {
      ANNULUS_RETURN_IF_ERROR(SettleReplacement(directory, name));
    }
  }
  return absl::OkStatus();
}

}  // namespace annulus
