#pragma once

// Machine profiles as protobuf text (src/config/machine.proto).

#include <string>

#include "annulus/base/status.h"
#include "annulus/parallel/machine_profile.h"

namespace annulus {

// `name` stands for the file in messages, which are like those of LoadConfig: all of them at once, each with
// line, column, field, value and what was expected.
absl::StatusOr<MachineProfile> ParseProfile(const std::string& name, const std::string& text);

// ParseProfile gives the same profile again.
std::string ProfileText(const MachineProfile& profile);

}  // namespace annulus
