#pragma once

// What owners of memory and copies need from CUDA. In a build without CUDA each of these ends the job: no
// Device of kind kCuda gets this far.

#include <cstdint>
#include <vector>

#include "annulus/device/device.h"
#include "annulus/device/stream.h"

namespace annulus {

// Zeroed, aligned to kAlignmentBytes. Ends the job when there is not enough.
void* AllocateGpu(Device device, int64_t bytes);
void FreeGpu(Device device, void* data);  // waits for the device

void* AllocatePinned(Device device, int64_t bytes);
void FreePinned(Device device, void* data);  // waits for the device

void EnqueueCopy(const void* from, void* to, int64_t bytes, StreamHandle stream);
void EnqueueZero(void* data, int64_t bytes, StreamHandle stream);
// *pinned = value once all work enqueued on `stream` so far has run.
void EnqueueWrite(uint32_t* pinned, uint32_t value, StreamHandle stream);

// One range of addresses as large as the memory of a GPU. Its first `bytes()` have memory behind them.
class GpuRange {
 public:
  explicit GpuRange(Device device);
  GpuRange(const GpuRange&) = delete;
  GpuRange& operator=(const GpuRange&) = delete;
  ~GpuRange();  // waits for the device

  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  // At least `more` bytes of memory behind the present ones; what is there stays. Ends the job when there is
  // not enough.
  void Grow(int64_t more);

 private:
  Device device_;
  char* data_ = nullptr;
  int64_t bytes_ = 0;
  int64_t reserved_bytes_ = 0;
  int64_t granularity_bytes_ = 0;
  std::vector<int64_t>
      steps_;  // bytes of each piece of memory, in order: they are unmapped as they were mapped
};

}  // namespace annulus
