#include "annulus/base/check.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

namespace annulus {

CheckFailure::CheckFailure(const char* file, int line, const char* condition) {
  const char* rank = std::getenv("OMPI_COMM_WORLD_RANK");
  stream_ << "annulus: invariant broken at " << file << ":" << line << ": " << condition;
  if (rank != nullptr) stream_ << " [world rank " << rank << "]";
  stream_ << " ";
}

CheckFailure::~CheckFailure() {
  const std::string text = stream_.str() + "\n";
  std::fflush(stdout);
  std::fwrite(text.data(), 1, text.size(), stderr);
  std::fflush(stderr);
  _exit(kInvariantExitCode);
}

}  // namespace annulus
