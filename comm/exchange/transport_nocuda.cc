#include "annulus/comm/exchange_transport.h"
#include "host_transport.h"

namespace annulus {

absl::StatusOr<TransportKind> ChooseTransport(Communicator, const Context&) { return TransportKind::kHost; }

absl::StatusOr<std::unique_ptr<ExchangeTransport>> MakeTransport(TransportKind kind, Communicator cp,
                                                                 Context&) {
  if (kind != TransportKind::kHost) return Invalid("exchange by ", Name(kind), ": this build has no CUDA");
  return MakeHostTransport(std::move(cp));
}

}  // namespace annulus
