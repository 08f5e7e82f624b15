// Results of a study from its folder.

#include "annulus/base/file.h"
#include "annulus/study/report.h"
#include "annulus/study/study_run.h"
#include "annulus/train/study_config.h"
#include "study_json.h"

namespace annulus {
namespace {

// Into the result of a point that is open.
absl::Status ReadPointOf(const std::string& study_dir, PointResult* result) {
  const std::string path = absl::StrCat(study_dir, "/points/", result->point.id, "/result.json");
  if (result->state != PointState::kOpen || !Exists(path)) return absl::OkStatus();
  ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  absl::StatusOr<StoredPoint> stored = ParseStoredPoint(text);
  ANNULUS_RETURN_IF_ERROR(Prefixed(stored.status(), path + ": "));
  PointMachine machine = std::move(result->machine);
  *result = std::move(stored->result);
  result->machine = std::move(machine);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<StudyResults> ReadStudy(const std::string& study_dir) {
  const std::string path = study_dir + "/study.resolved.textproto";
  ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  ANNULUS_ASSIGN_OR_RETURN(const ResolvedStudy study, LoadStudy(path, text));
  ANNULUS_ASSIGN_OR_RETURN(const std::string run_text, ReadFile(study.spec.run));
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<PlannedPoint> points, StudyGrid(study.spec, run_text));
  ANNULUS_ASSIGN_OR_RETURN(StudyResults results, OpenResults(study.spec, points));
  for (PointResult& result : results.points) ANNULUS_RETURN_IF_ERROR(ReadPointOf(study_dir, &result));
  return results;
}

}  // namespace annulus
