#pragma once

// Ranks that are threads of this process.

#include <functional>
#include <thread>
#include <vector>

#include "annulus/comm/communicator.h"

namespace annulus::testing {

// Runs fn(communicator) on a thread per rank.
inline void OnLoopback(int ranks, const std::function<void(Communicator)>& fn, double timeout_seconds = 120) {
  std::vector<std::thread> threads;
  for (const Communicator& comm : MakeLoopbackGroup(ranks, timeout_seconds)) threads.emplace_back(fn, comm);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace annulus::testing
