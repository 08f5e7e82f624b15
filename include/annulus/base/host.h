#pragma once

#include <string>

namespace annulus {

// Of the machine that this process runs on.
std::string HostName();

}  // namespace annulus
