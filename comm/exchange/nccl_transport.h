#pragma once

#include <memory>

#include "annulus/comm/exchange_transport.h"

namespace annulus {

// TransportKind::kNccl. Collective.
absl::StatusOr<std::unique_ptr<ExchangeTransport>> MakeNcclTransport(Communicator cp, Context& ctx,
                                                                     LinkThrottle throttle);

}  // namespace annulus
