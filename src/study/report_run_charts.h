#pragma once

// Charts over the steps of a run, of which there may be hundreds of thousands: means of consecutive steps,
// with bands that keep the least and the most.

#include <optional>
#include <string>
#include <vector>

#include "html_page.h"
#include "report_run_data.h"
#include "svg_chart.h"

namespace annulus {

// Points as they are while they are few.
Curve ThinnedCurve(const std::vector<ChartPoint>& points, const std::string& label, int color);
Curve RunCurve(const RunRecord& run, RunNumber number, const std::string& label, int color);
// Areas on top of each other: first `whole` less the parts, then the parts.
std::vector<Curve> StackedCurves(const RunRecord& run, RunNumber whole, const std::vector<RunNumber>& parts);

// Whether there are so many steps that charts show means of several.
bool IsLong(const RunRecord& run);
// Says how charts are thinned; nothing where they are not.
std::string ThinningText(const RunRecord& run);

enum class RunX { kSteps, kTokens };  // tokens are logarithmic
struct RunChart {
  std::string title, unit;
  std::vector<Curve> curves = {};  // over steps
  RunX x = RunX::kSteps;
  Scale scale = Scale::kLinear;
  std::optional<double> from = {};
  std::string (*tick)(double) = nullptr;
};
// With the events of the run.
HtmlPage::Panel PanelOf(const RunRecord& run, const RunChart& chart);

enum class OfRange { kMean, kMeanLeastMost };
struct RunColumn {
  std::string name;
  RunNumber number;
  std::string (*text)(double);
  OfRange of_range = OfRange::kMean;
};
// A few dozen rows: steps, or ranges of steps.
HtmlTable RunTable(const RunRecord& run, const std::string& caption, const std::vector<RunColumn>& columns);

}  // namespace annulus
