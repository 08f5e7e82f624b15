#pragma once

// Order of work on a GPU. On CPUs work is done when its call returns: streams and events are empty there, and
// everything in this file does nothing. A CUDA call that fails here (the device is lost, a kernel read a
// wrong address) cannot be recovered from: it ends the job with the call, the library's message and the rank.

#include "annulus/device/device.h"

struct CUstream_st;
struct CUevent_st;

namespace annulus {

using StreamHandle = CUstream_st*;  // a cudaStream_t; null on CPUs

// Whether waiting work of this stream is scheduled before that of others. Transfers go first: a kernel that
// fills the device would hold them up.
enum class StreamPriority { kNormal, kHigh };

// A queue of work in order. Move-only.
class Stream {
 public:
  Stream() = default;  // none
  explicit Stream(Device device, StreamPriority priority = StreamPriority::kNormal);
  Stream(Stream&& other) noexcept;
  Stream& operator=(Stream&& other) noexcept;
  ~Stream();

  StreamHandle handle() const { return handle_; }
  void Synchronize() const;  // the host waits for all work enqueued so far

 private:
  StreamHandle handle_ = nullptr;
};

enum class EventTiming { kNone, kTimed };

// A point in a stream. Move-only.
class Event {
 public:
  Event() = default;  // none
  explicit Event(Device device, EventTiming timing = EventTiming::kNone);
  Event(Event&& other) noexcept;
  Event& operator=(Event&& other) noexcept;
  ~Event();

  void Record(StreamHandle stream);
  bool Done() const;         // all work before the last Record has run; true if never recorded
  void Synchronize() const;  // the host waits
  // Work enqueued on `stream` from now on waits for the last Record.
  void Hold(StreamHandle stream) const;
  // From `begin` to `end`, two timed events that are recorded and done; 0 on CPUs.
  static double Seconds(const Event& begin, const Event& end);

 private:
  CUevent_st* handle_ = nullptr;
};

}  // namespace annulus
