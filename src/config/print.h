#pragma once

// Messages as protobuf text: the resolved configuration, each value with its source as a comment; and others.

#include <google/protobuf/message.h>

#include <string>

#include "provenance.h"

namespace annulus::config {

std::string PrintResolved(const google::protobuf::Message& message, const Provenance& provenance);

// Any message; those inside of it that hold single values only take one line each.
std::string PrintCompact(const google::protobuf::Message& message);

}  // namespace annulus::config
