#pragma once

// Arrivals by a stream of copies and writes of flags, issued by a host thread of its own.

#include <cuda.h>

#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#include "cuda/attention_mma/device_arrays.h"

namespace annulus::testing {

using Clock = std::chrono::steady_clock;

inline void BusyWaitUntil(Clock::time_point time) {
  while (Clock::now() < time) {
  }
}

template <typename Function>
Function DriverEntry(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  CUDA(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result));
  return reinterpret_cast<Function>(found);
}

// A stream that orders nothing with the default one, whose kernel waits for it.
class FlagStream {
 public:
  FlagStream() { CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  FlagStream(const FlagStream&) = delete;
  ~FlagStream() { cudaStreamDestroy(stream_); }
  cudaStream_t get() const { return stream_; }

  void Write(uint32_t* flag, uint32_t value) const {
    static const auto write = DriverEntry<decltype(&cuStreamWriteValue32)>("cuStreamWriteValue32");
    Check(write(stream_, reinterpret_cast<CUdeviceptr>(flag), value, CU_STREAM_WRITE_VALUE_DEFAULT));
  }
  // What follows on the stream waits for the flag to come to `value`.
  void Wait(uint32_t* flag, uint32_t value) const {
    static const auto wait = DriverEntry<decltype(&cuStreamWaitValue32)>("cuStreamWaitValue32");
    Check(wait(stream_, reinterpret_cast<CUdeviceptr>(flag), value, CU_STREAM_WAIT_VALUE_GEQ));
  }

 private:
  static void Check(CUresult result) {
    if (result == CUDA_SUCCESS) return;
    std::printf("operation of a stream on a flag: error %d\n", result);
    std::exit(1);
  }
  cudaStream_t stream_ = nullptr;
};

}  // namespace annulus::testing
