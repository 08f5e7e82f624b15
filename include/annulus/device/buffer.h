#pragma once

// Owners of memory. Buffer: one zeroed allocation. Arena: a bump allocator with Mark/Release that grows
// by whole blocks, so a step that repeats allocates nothing after its first run; it knows its high-water
// mark.

#include <cstdint>
#include <vector>

#include "annulus/device/tensor.h"

namespace annulus {

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

class Arena {
 public:
  struct Position {
    size_t block = 0;
    int64_t offset = 0;
  };

  explicit Arena(Device device) : device_(device) {}
  Arena(Arena&&) = default;

  // Uninitialised memory, valid until a Release to an earlier mark.
  TensorRef Allocate(DType dtype, Shape shape);
  TensorRef AllocateZeroed(DType dtype, Shape shape);

  Position Mark() const { return position_; }
  void Release(Position position) { position_ = position; }

  int64_t capacity_bytes() const;
  int64_t used_bytes() const;
  int64_t high_water_bytes() const { return high_water_bytes_; }

 private:
  Device device_;
  std::vector<Buffer> blocks_;
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
