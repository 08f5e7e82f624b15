#pragma once

// Text of modeling_annulus.py.

#include "absl/strings/string_view.h"

namespace annulus {

absl::string_view ModelingCode();

}  // namespace annulus
