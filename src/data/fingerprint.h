#pragma once

// Adds a file's identity to a hash: its size, its first and last page and pages spread evenly in between.
// Files of up to 64 pages of 4 KiB count as a whole; the cost does not grow with larger ones.

#include "annulus/base/file.h"
#include "annulus/base/hash.h"

namespace annulus {

void AddFile(const MappedFile& file, Hasher* hasher);

}  // namespace annulus
