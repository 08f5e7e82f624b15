#include <cuda_runtime_api.h>

#include <cstdio>
#include <fstream>
#include <utility>

#include "../../src/device/cuda_call.h"
#include "annulus/base/host.h"
#include "annulus/device/gpu.h"
#include "annulus/device/stream.h"
#include "peer_memory.h"

namespace annulus {
namespace {

// CUDA maps whole allocations of this size into peers.
constexpr int64_t kPageBytes = int64_t{2} << 20;

// Equal for two processes exactly if they run on one machine: since its last start it has had this number.
std::string MachineIdentity() {
  std::string identity;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> identity;
  if (!identity.empty()) return identity;
  return HostName();
}

// Whether CUDA denies mapping between this rank's GPU and that of a peer. GPUs that this process does not see
// (each process has its own in CUDA_VISIBLE_DEVICES) can only be tried.
absl::Status CheckAccess(Device device, const std::string& peer_identity, int peer) {
  for (int index = 0; index < GpuCount(); ++index) {
    ANNULUS_ASSIGN_OR_RETURN(const GpuInfo gpu, DescribeGpu(index));
    if (gpu.identity != peer_identity || index == device.index) continue;
    int can = 0;
    ANNULUS_RETURN_IF_ERROR(
        CudaStatus("cudaDeviceCanAccessPeer", cudaDeviceCanAccessPeer(&can, device.index, index)));
    if (can == 0) {
      return Invalid(ToString(device), " cannot map the memory of ",
                     ToString(Device{DeviceKind::kCuda, index}), ", the GPU of rank ", peer);
    }
  }
  return absl::OkStatus();
}

}  // namespace

PeerMemory::PeerMemory(Communicator cp, Device device)
    : cp_(std::move(cp)), device_(device), at_(static_cast<size_t>(cp_.size())) {}

PeerMemory::~PeerMemory() {
  if (abandoned_ || bytes_ == 0) return;
  const absl::Status released = Release();
  if (!released.ok()) std::fprintf(stderr, "annulus: %s\n", released.ToString().c_str());
}

// Also waits for this rank's writes to all ranks.
absl::Status PeerMemory::Unmap() {
  ANNULUS_RETURN_IF_ERROR(CudaStatus("cudaDeviceSynchronize", cudaDeviceSynchronize()));
  for (int r = 0; r < cp_.size(); ++r) {
    char*& mapped = at_[static_cast<size_t>(r)];
    if (r == cp_.rank() || mapped == nullptr) continue;
    ANNULUS_RETURN_IF_ERROR(CudaStatus("cudaIpcCloseMemHandle", cudaIpcCloseMemHandle(mapped)));
    mapped = nullptr;
  }
  return absl::OkStatus();
}

absl::Status PeerMemory::Release() {
  // Each frees its own once no rank writes into it nor has it mapped.
  ANNULUS_RETURN_IF_ERROR(cp_.AgreeOk(Unmap()));
  bytes_ = 0;
  return CudaStatus("cudaFree", cudaFree(std::exchange(at_[static_cast<size_t>(cp_.rank())], nullptr)));
}

absl::Status PeerMemory::Allocate(int64_t bytes, std::string* handle) {
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, static_cast<size_t>(bytes));
  if (error != cudaSuccess) {
    return Prefixed(CudaStatus("cudaMalloc", error), absl::StrCat("exchange memory of ", bytes, " bytes: "));
  }
  at_[static_cast<size_t>(cp_.rank())] = static_cast<char*>(data);
  const Stream stream(device_);
  ANNULUS_RETURN_IF_ERROR(
      CudaStatus("cudaMemsetAsync", cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream.handle())));
  ANNULUS_RETURN_IF_ERROR(CudaStatus("cudaStreamSynchronize", cudaStreamSynchronize(stream.handle())));
  cudaIpcMemHandle_t ipc;
  ANNULUS_RETURN_IF_ERROR(CudaStatus("cudaIpcGetMemHandle", cudaIpcGetMemHandle(&ipc, data)));
  handle->assign(ipc.reserved, sizeof(ipc.reserved));
  return absl::OkStatus();
}

absl::Status PeerMemory::Map(const std::vector<std::string>& handles) {
  for (int r = 0; r < cp_.size(); ++r) {
    if (r == cp_.rank()) continue;
    cudaIpcMemHandle_t ipc;
    handles[static_cast<size_t>(r)].copy(ipc.reserved, sizeof(ipc.reserved));
    void* mapped = nullptr;
    const cudaError_t error = cudaIpcOpenMemHandle(&mapped, ipc, cudaIpcMemLazyEnablePeerAccess);
    ANNULUS_RETURN_IF_ERROR(
        Prefixed(CudaStatus("cudaIpcOpenMemHandle", error), absl::StrCat("memory of rank ", r, ": ")));
    at_[static_cast<size_t>(r)] = static_cast<char*>(mapped);
  }
  return absl::OkStatus();
}

absl::Status PeerMemory::Resize(int64_t bytes) {
  ANNULUS_RETURN_IF_ERROR(cp_.AgreeOk(UseGpu(device_.index)));
  if (bytes_ > 0) ANNULUS_RETURN_IF_ERROR(Release());
  const int64_t rounded = (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
  std::string handle;
  absl::Status status = cp_.AgreeOk(Allocate(rounded, &handle));
  if (status.ok()) {
    ANNULUS_ASSIGN_OR_RETURN(const std::vector<std::string> handles, cp_.AllGatherStrings(handle));
    status = cp_.AgreeOk(Map(handles));
  }
  if (status.ok()) {
    bytes_ = rounded;
    return status;
  }
  const absl::Status released = Release();
  return status;
}

absl::Status CheckPeerMemory(Communicator cp, Device device) {
  absl::StatusOr<GpuInfo> gpu =
      Invalid("exchange by copy engines: device=", ToString(device), ": expected a GPU");
  if (device.kind == DeviceKind::kCuda) gpu = DescribeGpu(device.index);
  ANNULUS_RETURN_IF_ERROR(cp.AgreeOk(gpu.status()));
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<std::string> machines, cp.AllGatherStrings(MachineIdentity()));
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<std::string> gpus, cp.AllGatherStrings(gpu->identity));
  absl::Status possible;
  for (int r = 0; r < cp.size() && possible.ok(); ++r) {
    const size_t peer = static_cast<size_t>(r);
    possible = machines[peer] == machines[0] ? CheckAccess(device, gpus[peer], r)
                                             : Invalid("rank ", r, " is on another machine than rank 0");
  }
  possible = cp.AgreeOk(possible);
  if (possible.ok()) possible = PeerMemory(cp, device).Resize(kPageBytes);
  // Every rank has an error or none has.
  return possible.ok() ? possible : cp.AgreeOk(Invalid("exchange by copy engines: ", possible.message()));
}

}  // namespace annulus
