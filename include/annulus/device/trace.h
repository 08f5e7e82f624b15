#pragma once

// Names in a profiler's timeline (Nsight Systems). Without CUDA, and without a profiler, they cost nothing.

#include <string>

namespace annulus {

// What this thread does while the object lives, work that it enqueues included. Ranges nest.
class TraceRange {
 public:
  explicit TraceRange(const char* name);
  explicit TraceRange(const std::string& name) : TraceRange(name.c_str()) {}
  ~TraceRange();
  TraceRange(const TraceRange&) = delete;
  TraceRange& operator=(const TraceRange&) = delete;
};

}  // namespace annulus
