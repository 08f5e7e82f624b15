#pragma once

// `--set path=value`, applied to the parsed message.

#include <string>

#include "annulus.pb.h"
#include "provenance.h"

namespace annulus::config {

// Sets one field. A string is taken as it stands, without quotes; a message as "{...}", replacing the old
// one; "data.train[n]..." with n sources appends one. Errors go to `provenance`.
void ApplyOverride(const std::string& as_typed, Run* run, Provenance* provenance);

}  // namespace annulus::config
