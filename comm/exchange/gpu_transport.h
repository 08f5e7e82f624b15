#pragma once

// ChooseTransport and MakeTransport for a context on a GPU.

#include <memory>

#include "annulus/comm/exchange_transport.h"

namespace annulus {

absl::StatusOr<TransportKind> ChooseGpuTransport(Communicator cp, const Context& ctx);

// kHost: `cp` is throttled already.
absl::StatusOr<std::unique_ptr<ExchangeTransport>> MakeGpuTransport(TransportKind kind, Communicator cp,
                                                                    Context& ctx, LinkThrottle throttle);

}  // namespace annulus
