#pragma once

// Owners of memory. Buffer: one zeroed allocation. PinnedBuffer: host memory that GPUs copy from and to
// without the host's help. Arena: a bump allocator with Mark/Release that only grows, so a step that repeats
// allocates nothing after its first run; it knows its high-water mark.
//
// Memory that cannot be had ends the job with what was asked for and what is free. Owners of GPU memory wait
// for the device before they give it back: what is still enqueued may use it.

#include <cstdint>
#include <memory>
#include <vector>

#include "annulus/device/tensor.h"

namespace annulus {

class GpuRange;

inline constexpr int64_t kAlignmentBytes = 256;  // cudaMalloc's, and a multiple of every cache line

// Memory of this machine that can still be taken, by the system's account and this process's limit; -1 if
// unknown.
int64_t AvailableMemoryBytes();

class Buffer {
 public:
  Buffer() = default;
  Buffer(Device device, int64_t bytes);  // zero-filled
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  Device device() const { return device_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  Device device_;
};

// Page-locked for a GPU, plain memory for a CPU. Not zeroed.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  PinnedBuffer(Device device, int64_t bytes);  // for copies from or to `device`
  PinnedBuffer(PinnedBuffer&& other) noexcept;
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept;
  ~PinnedBuffer();

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  Device device_;
};

// A Buffer with a dtype and a shape.
class Tensor {
 public:
  Tensor() = default;
  Tensor(Device device, DType dtype, Shape shape);
  TensorRef ref() const { return {buffer_.data(), dtype_, buffer_.device(), shape_}; }

 private:
  Buffer buffer_;
  DType dtype_ = DType::kF32;
  Shape shape_;
};

// On a CPU it grows by whole blocks. On a GPU, where a tensor may be a large part of the memory, it is one
// range of addresses that physical memory is put behind as it is needed: no tensor strands the tail of a
// block. Such memory cannot be shared with other processes by cudaIpcGetMemHandle; that of a Buffer can.
class Arena {
 public:
  struct Position {
    size_t block = 0;  // 0 on GPUs
    int64_t offset = 0;
  };

  explicit Arena(Device device);
  Arena(Arena&& other) noexcept;
  ~Arena();

  // Uninitialised memory, valid until a Release to an earlier mark.
  TensorRef Allocate(DType dtype, Shape shape);
  Position Mark() const { return position_; }
  void Release(Position position) { position_ = position; }

  int64_t capacity_bytes() const;
  int64_t used_bytes() const;
  int64_t high_water_bytes() const { return high_water_bytes_; }

 private:
  char* TakeFromBlocks(int64_t bytes);
  char* TakeFromRange(int64_t bytes);

  Device device_;
  std::vector<Buffer> blocks_;       // CPU
  std::unique_ptr<GpuRange> range_;  // GPU; null until the first Allocate
  Position position_;
  int64_t high_water_bytes_ = 0;
};

// Releases on destruction what was allocated since construction.
class ArenaScope {
 public:
  explicit ArenaScope(Arena& arena) : arena_(arena), mark_(arena.Mark()) {}
  ~ArenaScope() { arena_.Release(mark_); }
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena& arena_;
  Arena::Position mark_;
};

}  // namespace annulus
