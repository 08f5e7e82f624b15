#include "annulus/base/check.h"

#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace annulus {
namespace {

// Global, because whoever fails knows nothing of the run; only ever printed.
std::atomic<int64_t> step_under_way{0};
static_assert(std::atomic<int64_t>::is_always_lock_free);  // signal handlers read it

}  // namespace

void NoteStep(int64_t step) { step_under_way = step; }
int64_t StepUnderWay() { return step_under_way; }

CheckFailure::CheckFailure(const char* file, int line, const char* condition) {
  const char* rank = std::getenv("OMPI_COMM_WORLD_RANK");
  stream_ << "annulus: invariant broken at " << file << ":" << line << ": " << condition;
  if (rank != nullptr) stream_ << " [world rank " << rank << "]";
  if (StepUnderWay() > 0) stream_ << " [step " << StepUnderWay() << "]";
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
