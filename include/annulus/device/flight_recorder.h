#pragma once

// What this rank's lanes of work were last doing, for the report of a job that hangs. A lane is a stream with
// a name ("compute", "exchange", "collectives"). Behind each noted piece of work the stream writes how many
// it has finished to host memory, so a report calls nothing that a hanging device could hold up: it compares
// numbers.

#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <string>

#include "annulus/device/buffer.h"
#include "annulus/device/stream.h"

namespace annulus {

class FlightRecorder {
 public:
  explicit FlightRecorder(Device device) : device_(device) {}

  // `what` was enqueued on `stream`, the lane's (null on CPUs: then `what` begins now, and what was noted
  // before it has ended). One thread and one stream a lane.
  void Note(const std::string& lane, std::string what, StreamHandle stream);
  // The step that is under way; part of every report.
  void BeginStep(int64_t step);
  int64_t step() const;

  // The step and one line a lane: "compute: finished `kv_ring ... attend`, waits for `...` (12 more behind
  // it)". Called from any thread, also while the device hangs.
  std::string Report() const;

 private:
  static constexpr size_t kKept = 2048;  // names a lane
  struct Lane {
    std::deque<std::string> names;  // the newest kKept
    uint32_t noted = 0;             // all in all, modulo 2^32
    PinnedBuffer finished;          // GPU: a uint32_t that the stream writes
  };
  uint32_t* FinishedOf(const std::string& lane);
  static size_t Unfinished(const Lane& lane);

  Device device_;
  mutable std::mutex mutex_;
  int64_t step_ = 0;
  std::map<std::string, Lane> lanes_;
};

}  // namespace annulus
