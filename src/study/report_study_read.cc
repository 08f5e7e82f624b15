// Results of a study from its folder.

#include <algorithm>

#include "annulus/base/file.h"
#include "annulus/study/report.h"
#include "annulus/study/study_run.h"
#include "annulus/train/study_config.h"
#include "study_json.h"

namespace annulus {
namespace {

absl::StatusOr<PointResult> ReadPointOf(const std::string& study_dir, const PlannedPoint& planned) {
  PointResult open;
  open.point = planned.point;
  open.layout = planned.layout;
  if (!planned.refused.ok()) {
    open.state = PointState::kFailed;
    open.reason = absl::StrCat("refused: ", std::string(planned.refused.message()));
    return open;
  }
  const std::string path = absl::StrCat(study_dir, "/points/", planned.point.id, "/result.json");
  if (!Exists(path)) return open;
  ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  absl::StatusOr<StoredPoint> stored = ParseStoredPoint(text);
  ANNULUS_RETURN_IF_ERROR(Prefixed(stored.status(), path + ": "));
  return std::move(stored->result);
}

}  // namespace

absl::StatusOr<StudyResults> ReadStudy(const std::string& study_dir) {
  const std::string path = study_dir + "/study.resolved.textproto";
  ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  ANNULUS_ASSIGN_OR_RETURN(const ResolvedStudy study, LoadStudy(path, text));
  ANNULUS_ASSIGN_OR_RETURN(const std::string run_text, ReadFile(study.spec.run));
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<PlannedPoint> points, StudyGrid(study.spec, run_text));
  const auto first = std::find_if(points.begin(), points.end(),
                                  [](const PlannedPoint& point) { return point.refused.ok(); });
  ANNULUS_ASSIGN_OR_RETURN(const MachineProfile machine, ProfileOf(*first));  // a grid has a sensible point
  StudyResults results{.name = study.spec.name,
                       .device = machine.device,
                       .profile_measured = machine.measured,
                       .memory_bytes = machine.memory_bytes,
                       .scaling = study.spec.scaling,
                       .points = {}};
  for (const PlannedPoint& planned : points) {
    ANNULUS_ASSIGN_OR_RETURN(results.points.emplace_back(), ReadPointOf(study_dir, planned));
  }
  return results;
}

}  // namespace annulus
