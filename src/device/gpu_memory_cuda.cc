#include <cuda.h>
#include <cudaTypedefs.h>

#include <algorithm>
#include <cstdio>

#include "annulus/device/gpu.h"
#include "cuda_call.h"
#include "gpu_memory.h"

namespace annulus {
namespace {

// A range grows by at least this much: a job's first step takes its tensors in few mappings.
constexpr int64_t kLeastGrowthBytes = int64_t{64} << 20;

int64_t RoundUp(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

std::string OutOfMemory(Device device, int64_t bytes) {
  cudaGetLastError();
  MakeCurrent(device);
  const absl::StatusOr<GpuMemory> memory = MemoryOfGpu();
  ANNULUS_CHECK_OK(memory.status());
  return absl::StrCat("out of memory: ", bytes, " bytes on ", ToString(device), ", ", memory->free_bytes,
                      " of ", memory->total_bytes, " bytes are free");
}

template <typename Function>
Function Required(const char* name, unsigned version) {
  const absl::StatusOr<void*> entry = DriverFunction(name, version);
  ANNULUS_CHECK_OK(entry.status());
  return reinterpret_cast<Function>(*entry);
}

struct Driver {
  PFN_cuGetErrorName_v6000 error_name = Required<PFN_cuGetErrorName_v6000>("cuGetErrorName", 6000);
  PFN_cuMemGetAllocationGranularity_v10020 granularity =
      Required<PFN_cuMemGetAllocationGranularity_v10020>("cuMemGetAllocationGranularity", 10020);
  PFN_cuMemAddressReserve_v10020 reserve =
      Required<PFN_cuMemAddressReserve_v10020>("cuMemAddressReserve", 10020);
  PFN_cuMemAddressFree_v10020 free_addresses =
      Required<PFN_cuMemAddressFree_v10020>("cuMemAddressFree", 10020);
  PFN_cuMemCreate_v10020 create = Required<PFN_cuMemCreate_v10020>("cuMemCreate", 10020);
  PFN_cuMemRelease_v10020 release = Required<PFN_cuMemRelease_v10020>("cuMemRelease", 10020);
  PFN_cuMemMap_v10020 map = Required<PFN_cuMemMap_v10020>("cuMemMap", 10020);
  PFN_cuMemUnmap_v10020 unmap = Required<PFN_cuMemUnmap_v10020>("cuMemUnmap", 10020);
  PFN_cuMemSetAccess_v10020 set_access = Required<PFN_cuMemSetAccess_v10020>("cuMemSetAccess", 10020);
  PFN_cuStreamWriteValue32_v11070 write_value =
      Required<PFN_cuStreamWriteValue32_v11070>("cuStreamWriteValue32", 11070);
};

const Driver& TheDriver() {
  static const Driver driver;
  return driver;
}

std::string DriverFailure(const char* call, CUresult error) {
  const char* name = nullptr;
  if (TheDriver().error_name(error, &name) != CUDA_SUCCESS) name = "unknown error";
  return absl::StrCat(call, ": ", name, " on ", CurrentDevice());
}

CUmemAllocationProp MemoryKind(Device device) {
  CUmemAllocationProp kind{};
  kind.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  kind.location = {CU_MEM_LOCATION_TYPE_DEVICE, device.index};
  return kind;
}

CUdeviceptr AddressOf(const void* data) { return reinterpret_cast<CUdeviceptr>(data); }

}  // namespace

#define ANNULUS_DRIVER_CHECK(call)                                                       \
  do {                                                                                   \
    const CUresult annulus_error = (call);                                               \
    ANNULUS_CHECK(annulus_error == CUDA_SUCCESS) << DriverFailure(#call, annulus_error); \
  } while (false)

void* AllocateGpu(Device device, int64_t bytes) {
  MakeCurrent(device);
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, static_cast<size_t>(bytes));
  ANNULUS_CHECK(error != cudaErrorMemoryAllocation) << OutOfMemory(device, bytes);
  ANNULUS_CHECK(error == cudaSuccess) << CudaFailure("cudaMalloc", error);
  // Our streams do not wait for the default stream, so the host does.
  ANNULUS_CUDA_CHECK(cudaMemset(data, 0, static_cast<size_t>(bytes)));
  ANNULUS_CUDA_CHECK(cudaStreamSynchronize(cudaStreamLegacy));
  return data;
}

void FreeGpu(Device device, void* data) {
  MakeCurrent(device);
  LogCudaFailure("cudaFree", cudaFree(data));  // waits for the device by itself
}

void* AllocatePinned(Device device, int64_t bytes) {
  MakeCurrent(device);
  void* data = nullptr;
  const cudaError_t error = cudaHostAlloc(&data, static_cast<size_t>(bytes), cudaHostAllocPortable);
  ANNULUS_CHECK(error != cudaErrorMemoryAllocation)
      << "out of memory: " << bytes << " bytes of pinned host memory";
  ANNULUS_CHECK(error == cudaSuccess) << CudaFailure("cudaHostAlloc", error);
  return data;
}

void FreePinned(Device device, void* data) {
  MakeCurrent(device);
  LogCudaFailure("cudaDeviceSynchronize", cudaDeviceSynchronize());
  LogCudaFailure("cudaFreeHost", cudaFreeHost(data));
}

void EnqueueCopy(const void* from, void* to, int64_t bytes, StreamHandle stream) {
  ANNULUS_CHECK(stream != nullptr) << "a copy from or to a GPU on no stream";
  ANNULUS_CUDA_CHECK(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, stream));
}

void EnqueueZero(void* data, int64_t bytes, StreamHandle stream) {
  ANNULUS_CHECK(stream != nullptr) << "memory of a GPU zeroed on no stream";
  ANNULUS_CUDA_CHECK(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream));
}

void EnqueueWrite(uint32_t* pinned, uint32_t value, StreamHandle stream) {
  ANNULUS_DRIVER_CHECK(
      TheDriver().write_value(stream, AddressOf(pinned), value, CU_STREAM_WRITE_VALUE_DEFAULT));
}

GpuRange::GpuRange(Device device) : device_(device) {
  MakeCurrent(device);
  const absl::StatusOr<GpuMemory> all = MemoryOfGpu();
  ANNULUS_CHECK_OK(all.status());
  const Driver& driver = TheDriver();
  const CUmemAllocationProp kind = MemoryKind(device);
  size_t granularity = 0;
  ANNULUS_DRIVER_CHECK(driver.granularity(&granularity, &kind, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED));
  granularity_bytes_ = static_cast<int64_t>(granularity);
  reserved_bytes_ = RoundUp(all->total_bytes, granularity_bytes_);
  CUdeviceptr begin = 0;
  ANNULUS_DRIVER_CHECK(driver.reserve(&begin, static_cast<size_t>(reserved_bytes_), 0, 0, 0));
  data_ = reinterpret_cast<char*>(begin);
}

GpuRange::~GpuRange() {
  MakeCurrent(device_);
  LogCudaFailure("cudaDeviceSynchronize", cudaDeviceSynchronize());
  const Driver& driver = TheDriver();
  const auto log = [&](const char* call, CUresult error) {
    if (error != CUDA_SUCCESS && error != CUDA_ERROR_DEINITIALIZED)
      std::fprintf(stderr, "annulus: %s\n", DriverFailure(call, error).c_str());
  };
  CUdeviceptr at = AddressOf(data_);
  for (const int64_t bytes : steps_) {
    log("cuMemUnmap", driver.unmap(at, static_cast<size_t>(bytes)));
    at += static_cast<CUdeviceptr>(bytes);
  }
  log("cuMemAddressFree", driver.free_addresses(AddressOf(data_), static_cast<size_t>(reserved_bytes_)));
}

void GpuRange::Grow(int64_t more) {
  MakeCurrent(device_);
  const Driver& driver = TheDriver();
  const int64_t step = RoundUp(std::max(more, kLeastGrowthBytes), granularity_bytes_);
  ANNULUS_CHECK(step <= reserved_bytes_ - bytes_) << OutOfMemory(device_, step);
  const CUmemAllocationProp kind = MemoryKind(device_);
  CUmemGenericAllocationHandle memory = 0;
  const CUresult error = driver.create(&memory, static_cast<size_t>(step), &kind, 0);
  ANNULUS_CHECK(error != CUDA_ERROR_OUT_OF_MEMORY) << OutOfMemory(device_, step);
  ANNULUS_CHECK(error == CUDA_SUCCESS) << DriverFailure("cuMemCreate", error);
  const CUdeviceptr at = AddressOf(data_ + bytes_);
  ANNULUS_DRIVER_CHECK(driver.map(at, static_cast<size_t>(step), 0, memory, 0));
  ANNULUS_DRIVER_CHECK(driver.release(memory));  // the mapping keeps it
  const CUmemAccessDesc access = {kind.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  ANNULUS_DRIVER_CHECK(driver.set_access(at, static_cast<size_t>(step), &access, 1));
  steps_.push_back(step);
  bytes_ += step;
}

}  // namespace annulus
