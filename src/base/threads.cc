#include "annulus/base/threads.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace annulus {

void ForEachInThreads(size_t begin, size_t end, size_t most, const std::function<void(size_t)>& fn) {
  std::atomic<size_t> next = begin;
  const auto work = [&] {
    for (size_t i = next++; i < end; i = next++) fn(i);
  };
  std::vector<std::thread> others(std::clamp<size_t>(std::thread::hardware_concurrency(), 1, most) - 1);
  for (std::thread& other : others) other = std::thread(work);
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace annulus
