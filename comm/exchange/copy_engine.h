#pragma once

#include <memory>

#include "annulus/comm/exchange_transport.h"

namespace annulus {

// TransportKind::kCopyEngine. Collective.
absl::StatusOr<std::unique_ptr<ExchangeTransport>> MakeCopyEngineTransport(Communicator cp, Context& ctx,
                                                                           LinkThrottle throttle);

}  // namespace annulus
