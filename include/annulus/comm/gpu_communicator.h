#pragma once

// Communicators whose tensors may lie on GPUs.

#include <string>

#include "annulus/comm/communicator.h"
#include "annulus/device/context.h"

namespace annulus {

// How tensors on GPUs travel; host tensors always go by the host communicator.
enum class GpuLink {
  kNccl,  // one GPU a rank
  kHost,  // through pinned memory and the host communicator: ranks that share a GPU, or no NCCL
};
absl::string_view Name(GpuLink link);  // "nccl", "host memory"

// kNccl if every rank of the group has a GPU of its own, else kHost. Collective.
absl::StatusOr<GpuLink> ChooseGpuLink(Communicator host, const Context& ctx);

// A communicator of the same group as `host` for tensors on ctx.device, and for host tensors as before.
// Collective. `ctx` must outlive it. InvalidArgument for kNccl names two ranks that share a GPU.
//
// Operations on device tensors are ordered by the context's stream, not by the host: an operation begins
// after what was enqueued on ctx.stream() before the call, and runs beside what is enqueued later. Wait()
// makes the stream, not the host, wait for it: work enqueued after Wait() sees the result (and may overwrite
// the operands). Test() is true once the device has finished. Each operation is noted in ctx.recorder under
// `lane`, which no other communicator has.
//
// Messages go to other ranks, and a pair receives in the order in which it sends, whatever the tags. Sends
// and receives posted one after the other start together, at the next Test, Wait or collective: no order of
// posting makes two ranks wait for each other.
//
// kNccl: sums are taken in an order fixed by the group and the size, not in rank order, and those of bf16 are
// rounded at every addition. NCCL connects two ranks when they first need it: until both have called, that
// first operation may hold the host. kHost: sums as on hosts; Wait() blocks the host until the result is on
// its way to the device.
absl::StatusOr<Communicator> WithGpu(Communicator host, GpuLink link, Context& ctx,
                                     std::string lane = "collectives");

// "NCCL 2.28.3"; "none" in a build without CUDA.
std::string NcclVersion();

}  // namespace annulus
