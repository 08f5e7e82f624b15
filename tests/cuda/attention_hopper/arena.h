#pragma once

#include <string>

namespace annulus::testing {

// Checks the forward over an arena with chunks that arrive by the copy engine at random times, then times it
// beside a launch per chunk. `program`: this one's path, which runs itself for what ends with an error.
bool RunArena(const std::string& program);

// A part that never arrives must end in a reported error; the process's GPU context is lost behind it.
bool RunArenaMissing();

}  // namespace annulus::testing
