#pragma once

// Where kernels take keys as they come in the steps of a plan that may (KeyArrival::kDuring). Elsewhere such
// a step is computed as any other, once all is there.

#include "annulus/comm/exchange_transport.h"
#include "annulus/parallel/attend_calls.h"
#include "annulus/parallel/choose_plan.h"

namespace annulus {

// Whether the plan has such steps and kernels of this case, of a general mask, wait for their keys themselves
// where the transport brings them. The same for all ranks.
bool TakesArrivals(const AttentionKernelCase& kernel, const AttentionCase& layer, const ExchangePlan& plan,
                   TransportKind transport, LinkThrottle throttle);

}  // namespace annulus
