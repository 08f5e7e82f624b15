#include "annulus/device/wait_clock.h"

#include "annulus/base/check.h"

namespace annulus {

void WaitClock::Begin(WaitKind kind, StreamHandle stream) {
  ANNULUS_CHECK(!Of(kind).open()) << "wait " << static_cast<int>(kind) << " begins twice";
  Of(kind).Begin(stream);
}

void WaitClock::End(WaitKind kind, StreamHandle stream) {
  ANNULUS_CHECK(Of(kind).open()) << "wait " << static_cast<int>(kind) << " ends before it begins";
  Of(kind).End(stream);
}

}  // namespace annulus
