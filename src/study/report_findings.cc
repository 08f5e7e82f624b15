// What a study says of predictions and of the planner, for a console.

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "annulus/study/report.h"
#include "report_choice.h"
#include "report_text.h"

namespace annulus {
namespace {

// Empty where no point has both.
std::string ErrorLine(const StudyResults& results, const char* what, double (*value)(const StepFigures&)) {
  std::vector<double> errors;
  const PointResult* worst = nullptr;
  for (const PointResult& point : results.points) {
    if (!point.measured.has_value() || !point.predicted.has_value()) continue;
    const double error = std::abs(value(*point.predicted) / value(*point.measured) - 1);
    if (!std::isfinite(error)) continue;
    if (errors.empty() || error > *std::max_element(errors.begin(), errors.end())) worst = &point;
    errors.push_back(error);
  }
  if (errors.empty()) return "";
  return absl::StrCat("predicted ", what, ": ", ErrorsText(errors, worst->point.id));
}

}  // namespace

std::vector<std::string> StudyFindings(const StudyResults& results) {
  std::vector<std::string> lines = {
      ErrorLine(results, "step time", [](const StepFigures& f) { return f.step_seconds; }),
      ErrorLine(results, "memory",
                [](const StepFigures& f) { return static_cast<double>(f.memory_bytes()); }),
      ChoiceText(LayoutCases(results))};
  lines.erase(std::remove(lines.begin(), lines.end(), ""), lines.end());
  return lines;
}

}  // namespace annulus
