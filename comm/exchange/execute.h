#pragma once

#include "annulus/comm/exchange_transport.h"

namespace annulus {

// ExchangeTransport::Execute by Send and Receive of `cp`, which tells messages of a pair apart by their tags
// and has no other user meanwhile. A message is one Send for each field of its slot.
absl::Status ExecuteByHost(Context& ctx, const ExchangePlan& plan, Communicator& cp,
                           const ExchangeBinding& binding, ExchangeStats* stats);

}  // namespace annulus
