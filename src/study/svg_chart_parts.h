#pragma once

// Pieces of SVG that all charts are made of.

#include <string>

#include "svg_chart.h"

namespace annulus {

// Of all charts, in units of their view boxes; the page scales them to its width. Narrow enough that text of
// 13 units is readable on a phone.
inline constexpr double kChartWidth = 460;

std::string OpenSvg(double height, const std::string& title, const std::string& description);

// "end" or "mid" among the classes: where the text is anchored.
std::string TextAt(double x, double y, const std::string& classes, const std::string& text);

// shape: of kChartColors; 0 is a circle.
std::string PointSvg(double x, double y, int shape, const std::string& classes, const std::string& title);

}  // namespace annulus
