#pragma once

// What a machine can do, measured by `annulus calibrate` or assumed: all that the cost model knows of it.
// Stored as text (MachineProfile in src/config/machine.proto; configs/machine/*.textproto).

#include <string>
#include <vector>

#include "annulus/comm/exchange_transport.h"
#include "annulus/ops/attention.h"

namespace annulus {

// A rate that grows with size: between points linear in log(size), outside of them that of the nearest.
struct RatePoint {
  double size = 0;
  double per_second = 0;
  friend bool operator==(const RatePoint&, const RatePoint&) = default;
};
double RateAt(const std::vector<RatePoint>& points, double size);  // points ascending in size, not empty

// Of one call of a block kernel alone: of the library as AttentionForwardWhole and AttentionBackwardWhole run
// it, so that adding to results that are there already is a pass over memory besides; of our own adding, so
// that emptying and rounding results are passes. size: WorkOf the call; per_second: that.
struct AttentionRate {
  AttentionKernel kernel = AttentionKernel::kCpuTiles;
  Pass pass = Pass::kForward;
  MaskShape shape = MaskShape::kFull;
  int64_t head_dim = 0, v_head_dim = 0;
  Determinism determinism = Determinism::kOff;  // kRequired only where OrdersSums
  std::vector<RatePoint> pairs = {};
  friend bool operator==(const AttentionRate&, const AttentionRate&) = default;
};

// Of one way of moving messages between two ranks of a host (or, between_hosts, of two hosts).
struct LinkRate {
  TransportKind transport = TransportKind::kHost;
  // size: bytes of one message; per_second: bytes that a rank sends to one peer, message after message; and
  // to two peers together, with messages of that size to each.
  std::vector<RatePoint> one_way, both_ways;
  double message_seconds = 0;     // of an empty message, from send to receive
  double computing_slowdown = 1;  // of a kernel that runs while messages move: NCCL takes SMs
  friend bool operator==(const LinkRate&, const LinkRate&) = default;
};

// A scan of states of a state-space layer: all kernels of one pass. size: tokens * heads * state * head_dim
// (elements of states that are updated); per_second: those.
enum class ScanKernel { kSsd, kDeltaRule };
struct ScanRate {
  ScanKernel kernel = ScanKernel::kSsd;
  Pass pass = Pass::kForward;
  std::vector<RatePoint> updates;
  friend bool operator==(const ScanRate&, const ScanRate&) = default;
};

// A pass over memory by what it does: on CPUs few are as fast as a copy. size: bytes read and written, per
// token as the cost of a step counts them; per_second: those.
enum class PassKind {
  kMove,        // copies, sums, scaling, zeroing: as `copy`
  kNorm,        // RMS norm, of length 1 as well
  kActivation,  // SwiGLU, SiLU, squared ReLU, features
  kRope,
  kConvolution,  // short, with SiLU
  kGatedNorm,
  kCrossEntropy,  // over logits, their gradient in place
  kAdamW,
};
struct PassRate {
  PassKind kind = PassKind::kMove;
  Pass pass = Pass::kForward;
  std::vector<RatePoint> bytes;
  friend bool operator==(const PassRate&, const PassRate&) = default;
};

// How the ranks of several hosts are joined.
struct NetworkProfile {
  int ranks_per_host = 0;       // 0: any number of ranks are on one host
  std::vector<LinkRate> links;  // between ranks of two hosts; empty: not known
  // Through all network cards of a host together, each way, shared by its ranks; 0: each rank has its own.
  double host_bytes_per_second = 0;
  // As those of MachineProfile, of groups with one rank on each host.
  std::vector<RatePoint> collectives = {};
  double collective_slowdown = 1;
  double collective_step_seconds = 4e-6;
  friend bool operator==(const NetworkProfile&, const NetworkProfile&) = default;
};

// What ends runs, and what going on costs.
struct ReliabilityProfile {
  double failure_hours = 0;             // mean time between failures of one host; 0: none fails
  double restart_seconds = 0;           // from a failure to the first step after it, reading left out
  double storage_bytes_per_second = 0;  // of checkpoints, for each host; 0: saving takes no time
  friend bool operator==(const ReliabilityProfile&, const ReliabilityProfile&) = default;
};

struct MachineProfile {
  std::string device;          // "NVIDIA H200"; "CPU, 2 cores"
  bool measured = false;       // false: assumed
  int ranks = 0;               // for which the links were measured
  int multiprocessors = 0;     // of the GPU
  int compute_capability = 0;  // of the GPU, 90 for 9.0; 0: not known
  std::vector<AttentionRate> attention;
  std::vector<LinkRate> links;
  std::vector<RatePoint> copy;  // size: bytes read and written by a pass over memory; per_second: those
  double launch_seconds = 0;    // of a kernel that does nothing, launched behind others
  // Matrix products of the shapes that expand latents, in bf16 on GPUs and f32 on CPUs: y = x w^T; and those
  // of both of its gradients, one behind the other. size: FLOPs; per_second: those. Empty: not measured.
  std::vector<RatePoint> products = {}, product_gradients = {};
  std::vector<ScanRate> scans = {};   // empty: not measured
  std::vector<PassRate> passes = {};  // of kinds that are not here: as `copy`
  // Of collectives among the ranks of a host. size: bytes that a rank sends in all; per_second: those, a
  // ring's latency included.
  std::vector<RatePoint> collectives = {};
  double collective_slowdown = 1;  // of computing while a collective is under way
  // Of NCCL's rings and trees, from a rank to the next: by NCCL's own tuning (src/graph/tuning.cc), LL128
  // over NVLink and, above, a network.
  double collective_step_seconds = 1.9e-6;
  double peak_tflops = 0;    // of dense bf16 by the datasheet; 0: not known
  int64_t memory_bytes = 0;  // of a GPU, or of a rank's share of the host; 0: not known
  int64_t other_memory_bytes =
      0;  // that a rank takes besides what its run plans: program, CUDA, NCCL, libraries
  NetworkProfile network = {};
  ReliabilityProfile reliability = {};
  friend bool operator==(const MachineProfile&, const MachineProfile&) = default;
};

// Whether the machine runs kernels for Hopper; where its GPU is not known, whether it has rates of them.
bool RunsHopperKernels(const MachineProfile& machine);

// Of products in this dtype: the profile's; those of the assumed profile of the device where it has none.
struct ProductRates {
  std::vector<RatePoint> forward, gradients;
};
ProductRates ProductRatesOf(const MachineProfile& machine, DeviceKind device, DType dtype);

// Profiles to go by where nothing was measured.
MachineProfile AssumedHopper();   // H200 with NVLink: rates of our measurements
MachineProfile AssumedCpuCore();  // one core a rank, shared memory

}  // namespace annulus
