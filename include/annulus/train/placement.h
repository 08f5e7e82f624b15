#pragma once

// Which device each rank computes on, and what follows from it.

#include <memory>

#include "annulus/comm/process_mesh.h"
#include "annulus/model/cost.h"
#include "annulus/parallel/attention_geometry.h"
#include "annulus/train/spec.h"
#include "annulus/train/watchdog.h"

namespace annulus {

// Puts definite values in place of spec.device = kAuto (GPUs if the ranks see any) and spec.compute = kAuto
// (bf16 on GPUs whose kernels know the model's heads, else f32). `gpus` is what this rank sees: GpuCount().
// Unavailable or InvalidArgument, naming field and reason, where they cannot be had, and where kAuto would be
// GPUs on some ranks alone. The same on all ranks. Collective.
absl::Status ResolveDevice(Communicator world, int gpus, RunSpec* spec);

// The second half of it, for a device that is definite but need not be here.
absl::Status ResolveCompute(RunSpec* spec);

// The same for what is only planned, by this process alone: a spec that asks for GPUs, or for what only GPUs
// have, gets them where there are none.
absl::Status ResolvePlannedDevice(RunSpec* spec);

// Of definite ones.
DType DTypeOf(ComputeType compute);
DeviceKind DeviceKindOf(DeviceChoice device);

// This rank's device, made the thread's: ranks of a host take its GPUs in turn. Collective.
absl::StatusOr<Device> PlaceRank(Communicator world, const RunSpec& spec);

// "NVIDIA H200"; "CPU, 2 cores".
std::string DeviceName(Device device);

// Refuses, before it is taken, more memory than there is: `bytes` on each rank that shares its host or GPU
// with others. "memory: WHAT 3.0 GiB, expected at most ...: CURE". Collective.
absl::Status CheckMemory(Communicator world, Device device, int64_t bytes, absl::string_view what,
                         absl::string_view cure);

// What this rank computes on, its groups, and what exchanges inside a context-parallel group may be: as the
// spec asks, with the transports that the group can use.
struct Machine {
  std::unique_ptr<Context> ctx;
  ProcessMesh mesh;
  ExchangeOptions exchange;
  std::unique_ptr<Watchdog> watchdog = {};  // of SetUpWatchedMachine; goes first
};
// `device` is PlaceRank's. Collective.
absl::StatusOr<Machine> SetUpMachine(Communicator world, const RunSpec& spec, Device device);

// The same for what is no training run, but measures: while it is set up, and from then on, a rank that for
// spec.step_deadline_seconds begins and ends nothing ends the job. One CPU rank waits for nobody, and is
// left alone.
absl::StatusOr<Machine> SetUpWatchedMachine(Communicator world, const RunSpec& spec, Device device);

// What a rank of the run holds, with the buffers of the plans that it will choose. ResourceExhausted, by
// CheckMemory, if that is more than there is: the system would kill a rank in the middle of a step.
// Collective.
absl::StatusOr<MemoryPlan> PlannedMemory(const RunSpec& spec, const Machine& machine);

}  // namespace annulus
