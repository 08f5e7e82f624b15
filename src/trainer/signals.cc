#include <unistd.h>

#include <csignal>

#include "annulus/train/run.h"

namespace annulus {
namespace {

// The one piece of global state: a signal handler has nothing else to write to.
volatile std::sig_atomic_t stop_requested = 0;

// A second SIGTERM does not wait for a step boundary, which may never come.
void OnStopSignal(int signal) {
  if (signal == SIGTERM && stop_requested != 0) _exit(128 + SIGTERM);
  stop_requested = 1;
}

}  // namespace

void InstallStopSignals() {
  struct sigaction action = {};
  action.sa_handler = OnStopSignal;
  action.sa_flags = SA_RESTART;
  sigaction(SIGUSR1, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

bool StopRequested() { return stop_requested != 0; }

}  // namespace annulus
