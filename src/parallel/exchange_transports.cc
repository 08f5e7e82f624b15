#include "annulus/parallel/exchange_transports.h"

namespace annulus {

absl::StatusOr<ExchangeTransport*> ExchangeTransports::Of(Context& ctx, TransportKind kind) {
  std::unique_ptr<ExchangeTransport>& transport = transports_[kind];
  if (transport == nullptr) {
    ANNULUS_ASSIGN_OR_RETURN(transport, MakeTransport(kind, cp_, ctx, throttle_));
  }
  return transport.get();
}

int64_t ExchangeTransports::device_bytes() const {
  int64_t bytes = 0;
  for (const auto& [kind, transport] : transports_) {
    if (transport != nullptr) bytes += transport->device_bytes();
  }
  return bytes;
}

}  // namespace annulus
