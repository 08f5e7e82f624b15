#pragma once

// This rank of a test of the exchange on its GPU. Ranks have a GPU each, or share.

#include "annulus/comm/exchange_transport.h"
#include "annulus/comm/gpu_communicator.h"
#include "annulus/device/gpu.h"
#include "support/mpi_main.h"

namespace annulus::testing {

// This rank's GPU, and the group on it.
class GpuRank {
 public:
  explicit GpuRank(Determinism determinism = Determinism::kOff) : ctx(MyGpu(), determinism) {
    const GpuLink link = ChooseGpuLink(World(), ctx).value();
    own_gpus = link == GpuLink::kNccl;
    cp = WithGpu(World(), GpuLink::kHost, ctx).value();
  }

  // Every transport that the ranks can use on this machine, the best last; by the host they always can.
  // Collective.
  std::vector<TransportKind> Transports() const {
    std::vector<TransportKind> kinds = {TransportKind::kHost};
    if (own_gpus) kinds.push_back(TransportKind::kNccl);
    const TransportKind best = ChooseTransport(cp, ctx).value();
    if (best == TransportKind::kCopyEngine) kinds.push_back(best);
    return kinds;
  }

  Context ctx;
  Communicator cp;
  bool own_gpus = false;

 private:
  static Device MyGpu() {
    const int gpus = GpuCount();
    EXPECT_GT(gpus, 0) << WhyNoGpu();
    const Device device{DeviceKind::kCuda, World().rank() % std::max(gpus, 1)};
    EXPECT_TRUE(UseGpu(device.index).ok());
    return device;
  }
};

}  // namespace annulus::testing
