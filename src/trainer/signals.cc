#include <unistd.h>

#include <csignal>

#include "annulus/base/check.h"
#include "annulus/train/run.h"

namespace annulus {
namespace {

// The one piece of global state: a signal handler has nothing else to read and to write.
volatile std::sig_atomic_t stop_requested = 0;
volatile std::sig_atomic_t rank_of_job = 0;

// Appends text or a number to a line; for signal handlers, where printf is not allowed.
struct Line {
  char text[128];
  size_t size = 0;
  void Add(const char* more) {
    while (*more != '\0' && size < sizeof(text)) text[size++] = *more++;
  }
  void Add(int64_t number) {
    char digits[20];
    size_t count = 0;
    do digits[count++] = static_cast<char>('0' + number % 10);
    while ((number /= 10) > 0 && count < sizeof(digits));
    while (count > 0 && size < sizeof(text)) text[size++] = digits[--count];
  }
};

// mpirun ends a job with SIGTERM when one of its ranks has died: then this says in which step the others
// were.
void SayStep() {
  Line line;
  line.Add("annulus: rank ");
  line.Add(static_cast<int64_t>(rank_of_job));
  line.Add(": told to end (SIGTERM) in step ");
  line.Add(StepUnderWay());
  line.Add("\n");
  if (write(STDERR_FILENO, line.text, line.size) < 0) return;  // nobody reads: nothing to be done
}

// A second SIGTERM does not wait for a step boundary, which may never come.
void OnStopSignal(int signal) {
  if (signal == SIGTERM && stop_requested != 0) _exit(128 + SIGTERM);
  if (signal == SIGTERM) SayStep();
  stop_requested = 1;
}

}  // namespace

void InstallStopSignals(int world_rank) {
  rank_of_job = world_rank;
  struct sigaction action = {};
  action.sa_handler = OnStopSignal;
  action.sa_flags = SA_RESTART;
  sigaction(SIGUSR1, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

bool StopRequested() { return stop_requested != 0; }

}  // namespace annulus
