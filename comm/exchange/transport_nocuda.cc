#include "gpu_transport.h"

namespace annulus {

absl::StatusOr<TransportKind> ChooseGpuTransport(Communicator, const Context& ctx) {
  return Invalid("exchange on ", ToString(ctx.device), ": this build has no CUDA");
}

absl::StatusOr<std::unique_ptr<ExchangeTransport>> MakeGpuTransport(TransportKind kind, Communicator,
                                                                    Context&, LinkThrottle) {
  return Invalid("exchange by ", Name(kind), ": this build has no CUDA");
}

}  // namespace annulus
