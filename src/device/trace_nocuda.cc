#include "annulus/device/trace.h"

namespace annulus {

TraceRange::TraceRange(const char*) {}
TraceRange::~TraceRange() = default;

}  // namespace annulus
