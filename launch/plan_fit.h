#pragma once

// What `annulus plan` prints of predicted steps, and its search for a layout.

#include <nlohmann/json.hpp>
#include <string>

#include "annulus/study/fit.h"

namespace annulus {

// "1,234 ms: computing 95.2%, ...", in lines of their own.
std::string StepText(const StepFigures& figures);
nlohmann::ordered_json StepJson(const StepFigures& figures);

std::string FitText(const FitResult& result);
nlohmann::ordered_json FitJson(const FitResult& result);

}  // namespace annulus
