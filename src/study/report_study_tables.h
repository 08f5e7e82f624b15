#pragma once

// Sections of a study's page that have no charts.

#include <vector>

#include "html_page.h"
#include "report_series.h"

namespace annulus {

// Nothing where no point has any.
void AddGoodput(const StudyResults& results, const std::vector<SeriesPanel>& panels, HtmlPage* page);
// The planner's choice against the best measured; nothing without layouts to choose from.
void AddChoices(const StudyResults& results, HtmlPage* page);
// Nothing where none failed.
void AddFailed(const StudyResults& results, HtmlPage* page);
void AddPoints(const StudyResults& results, HtmlPage* page);

}  // namespace annulus
