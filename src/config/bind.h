#pragma once

// The schema's messages into the plain structs of train/spec.h: ranges, what is required, what is derived.

#include "annulus.pb.h"
#include "annulus/train/spec.h"
#include "provenance.h"

namespace annulus::config {

// Reads `run`, completing it with defaults and derived values; errors go to `provenance`.
RunSpec Bind(Run* run, Provenance* provenance);

}  // namespace annulus::config
