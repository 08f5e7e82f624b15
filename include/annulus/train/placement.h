#pragma once

// Which device each rank computes on, and what follows from it.

#include <memory>

#include "annulus/comm/exchange_transport.h"
#include "annulus/comm/process_mesh.h"
#include "annulus/train/spec.h"

namespace annulus {

// Puts definite values in place of spec.device = kAuto (GPUs if this process sees any) and spec.compute =
// kAuto (bf16 on GPUs whose kernels know the model's heads, else f32). Unavailable or InvalidArgument, naming
// field and reason, where they cannot be had.
absl::Status ResolveDevice(RunSpec* spec);

// The second half of it, for a device that is definite but need not be here.
absl::Status ResolveCompute(RunSpec* spec);

// Of definite ones.
DType DTypeOf(ComputeType compute);
DeviceKind DeviceKindOf(DeviceChoice device);

// This rank's device, made the thread's: ranks of a host take its GPUs in turn. Collective.
absl::StatusOr<Device> PlaceRank(Communicator world, const RunSpec& spec);

// What this rank computes on, its groups, and how exchanges inside a context-parallel group travel: as the
// spec asks, or the best there is.
struct Machine {
  std::unique_ptr<Context> ctx;
  ProcessMesh mesh;
  TransportKind transport = TransportKind::kHost;
};
// `device` is PlaceRank's. Collective.
absl::StatusOr<Machine> SetUpMachine(Communicator world, const RunSpec& spec, Device device);

}  // namespace annulus
