#include "annulus/device/buffer.h"

#include <sys/resource.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>

namespace annulus {
namespace {

constexpr int64_t kMinBlockBytes = int64_t{16} << 20;  // few blocks, little waste on tiny models

int64_t RoundUp(int64_t bytes) { return (bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes; }

}  // namespace

int64_t AvailableMemoryBytes() {
  int64_t available = -1;
  std::ifstream file("/proc/meminfo");
  for (std::string key; file >> key;) {
    if (key == "MemAvailable:" && file >> available) {
      available *= 1024;  // given in KiB
      break;
    }
  }
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
    const int64_t most = static_cast<int64_t>(limit.rlim_cur);
    available = available < 0 ? most : std::min(available, most);
  }
  return available;
}

Buffer::Buffer(Device device, int64_t bytes) : bytes_(bytes), device_(device) {
  ANNULUS_CHECK(device.kind == DeviceKind::kCpu) << "no allocator for " << ToString(device);
  ANNULUS_CHECK(bytes >= 0);
  if (bytes == 0) return;
  data_ = std::aligned_alloc(static_cast<size_t>(kAlignmentBytes), static_cast<size_t>(RoundUp(bytes)));
  ANNULUS_CHECK(data_ != nullptr) << "out of memory: " << bytes << " bytes on " << ToString(device);
  std::memset(data_, 0, static_cast<size_t>(bytes));
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      device_(other.device_) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(device_, other.device_);
  return *this;
}

Buffer::~Buffer() { std::free(data_); }

Tensor::Tensor(Device device, DType dtype, Shape shape)
    : buffer_(device, shape.elements() * SizeOf(dtype)), dtype_(dtype), shape_(shape) {}

TensorRef Arena::Allocate(DType dtype, Shape shape) {
  const int64_t bytes = std::max(RoundUp(shape.elements() * SizeOf(dtype)), kAlignmentBytes);
  while (position_.block < blocks_.size() && position_.offset + bytes > blocks_[position_.block].bytes()) {
    ++position_.block;
    position_.offset = 0;
  }
  if (position_.block == blocks_.size()) blocks_.emplace_back(device_, std::max(bytes, kMinBlockBytes));
  char* data = static_cast<char*>(blocks_[position_.block].data()) + position_.offset;
  position_.offset += bytes;
  high_water_bytes_ = std::max(high_water_bytes_, used_bytes());
  return {data, dtype, device_, shape};
}

TensorRef Arena::AllocateZeroed(DType dtype, Shape shape) {
  TensorRef tensor = Allocate(dtype, shape);
  std::memset(tensor.raw(), 0, static_cast<size_t>(tensor.bytes()));
  return tensor;
}

int64_t Arena::capacity_bytes() const {
  int64_t bytes = 0;
  for (const Buffer& block : blocks_) bytes += block.bytes();
  return bytes;
}

int64_t Arena::used_bytes() const {
  int64_t bytes = position_.offset;
  for (size_t i = 0; i < position_.block; ++i) bytes += blocks_[i].bytes();
  return bytes;
}

}  // namespace annulus
