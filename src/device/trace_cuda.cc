#include <nvtx3/nvToolsExt.h>

#include "annulus/device/trace.h"

namespace annulus {

TraceRange::TraceRange(const char* name) { nvtxRangePushA(name); }
TraceRange::~TraceRange() { nvtxRangePop(); }

}  // namespace annulus
