#pragma once

// The transports of one group, each made at first use and kept. Communicators, streams and memory that peers
// map take far longer to make than a layer takes to run: what exchanges anew with every batch, plan or
// measurement shares one set.

#include <map>
#include <memory>

#include "annulus/comm/exchange_transport.h"

namespace annulus {

class ExchangeTransports {
 public:
  ExchangeTransports(Communicator cp, LinkThrottle throttle) : cp_(std::move(cp)), throttle_(throttle) {}

  // Collective at first use of the kind.
  absl::StatusOr<ExchangeTransport*> Of(Context& ctx, TransportKind kind);

  LinkThrottle throttle() const { return throttle_; }
  int64_t device_bytes() const;  // of memory that they keep on the device

 private:
  Communicator cp_;
  const LinkThrottle throttle_;
  std::map<TransportKind, std::unique_ptr<ExchangeTransport>> transports_;
};

}  // namespace annulus
