#pragma once

// The resolved configuration as protobuf text, each value with its source as a comment.

#include <string>

#include "annulus.pb.h"
#include "provenance.h"

namespace annulus::config {

std::string PrintResolved(const Run& run, const Provenance& provenance);

}  // namespace annulus::config
