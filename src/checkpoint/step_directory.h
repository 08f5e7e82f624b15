#pragma once

// Names inside a checkpoint directory, which steps it holds, and how one is deleted.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "annulus/base/status.h"

namespace annulus {

inline constexpr char kManifestName[] = "manifest.json";
inline constexpr char kCommitName[] = "COMMIT";
inline constexpr char kLatestName[] = "LATEST";
inline constexpr char kNextLatestName[] = "LATEST.tmp";  // becomes LATEST once its step is committed
inline constexpr char kTemporaryPrefix[] = ".tmp-";
inline constexpr char kReplacedSuffix[] = ".old";

std::string JoinPath(absl::string_view directory, absl::string_view name);
std::string StepName(int64_t step);                           // "step-00000500"
std::optional<int64_t> StepFromName(absl::string_view name);  // the inverse; empty for any other name
std::string CommitText(absl::string_view manifest_text);      // contents of COMMIT

struct StepDirectory {
  int64_t step = 0;
  std::string path;
  bool committed = false;
};

// By step, ascending. Where a replacement was cut short this is the one of step-N and step-N.old that is
// committed.
absl::StatusOr<std::vector<StepDirectory>> ListSteps(const std::string& directory);

// Deletes COMMIT first, so that what a crash leaves is no checkpoint.
absl::Status RemoveStep(const std::string& path);

// Deletes what interrupted saves left behind, and finishes or undoes a replacement that was cut short.
absl::Status RemoveLeftovers(const std::string& directory);

}  // namespace annulus
