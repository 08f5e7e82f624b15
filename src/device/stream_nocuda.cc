#include "annulus/base/check.h"
#include "annulus/device/stream.h"

namespace annulus {

Stream::Stream(Device device, StreamPriority) {
  ANNULUS_CHECK(device.kind == DeviceKind::kCpu) << ToString(device) << ": built without CUDA";
}
Stream::~Stream() = default;
void Stream::Synchronize() const {}

Event::Event(Device device, EventTiming) {
  ANNULUS_CHECK(device.kind == DeviceKind::kCpu) << ToString(device) << ": built without CUDA";
}
Event::~Event() = default;
void Event::Record(StreamHandle) {}
bool Event::Done() const { return true; }
void Event::Synchronize() const {}
void Event::Hold(StreamHandle) const {}
double Event::Seconds(const Event&, const Event&) { return 0; }

}  // namespace annulus
