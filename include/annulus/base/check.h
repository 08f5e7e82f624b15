#pragma once

// ANNULUS_CHECK(cond) << "context": a broken invariant of ours or of the caller. Prints file:line, the
// condition, the world rank, the step and the context to stderr, then ends the process with kInvariantExitCode
// without a core dump; mpirun then ends the other ranks. Never used for bad input (base/status.h).

#include <cstdint>
#include <sstream>

namespace annulus {

inline constexpr int kInvariantExitCode = 70;  // EX_SOFTWARE of sysexits.h

// The optimizer step that is under way, for messages of what ends the job; 0: none.
void NoteStep(int64_t step);
int64_t StepUnderWay();

class CheckFailure {
 public:
  CheckFailure(const char* file, int line, const char* condition);
  [[noreturn]] ~CheckFailure();
  std::ostream& stream() { return stream_; }

 private:
  std::ostringstream stream_;
};

// Lets the macro be an expression statement whose streamed operands are evaluated only on failure.
struct CheckVoidify {
  void operator&(std::ostream&) {}
};

}  // namespace annulus

#define ANNULUS_CHECK(cond) \
  (cond) ? (void)0 : ::annulus::CheckVoidify() & ::annulus::CheckFailure(__FILE__, __LINE__, #cond).stream()

// Aborts unless `expr` (an absl::Status) is OK.
#define ANNULUS_CHECK_OK(expr)                                        \
  do {                                                                \
    const auto annulus_check_status = (expr);                         \
    ANNULUS_CHECK(annulus_check_status.ok()) << annulus_check_status; \
  } while (false)
