#pragma once

#include <memory>

#include "annulus/comm/exchange_transport.h"

namespace annulus {

// TransportKind::kHost over `cp`, which sends tensors of the device of the contexts that use the transport,
// tells messages of a pair apart by their tags, and has no other user meanwhile.
std::unique_ptr<ExchangeTransport> MakeHostTransport(Communicator cp);

}  // namespace annulus
