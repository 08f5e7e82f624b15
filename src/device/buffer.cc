#include "annulus/device/buffer.h"

#include <sys/resource.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>

#include "gpu_memory.h"

namespace annulus {
namespace {

constexpr int64_t kMinBlockBytes = int64_t{16} << 20;  // few blocks, little waste on tiny models

int64_t RoundUp(int64_t bytes) { return (bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes; }

void* AllocateHost(int64_t bytes) {
  void* data = std::aligned_alloc(static_cast<size_t>(kAlignmentBytes), static_cast<size_t>(RoundUp(bytes)));
  ANNULUS_CHECK(data != nullptr) << "out of memory: " << bytes << " bytes on " << ToString(Device{}) << ", "
                                 << AvailableMemoryBytes() << " are free";
  return data;
}

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
  ANNULUS_CHECK(bytes >= 0);
  if (bytes == 0) return;
  if (device.kind == DeviceKind::kCuda) {
    data_ = AllocateGpu(device, bytes);
  } else {
    data_ = AllocateHost(bytes);
    std::memset(data_, 0, static_cast<size_t>(bytes));
  }
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

Buffer::~Buffer() {
  if (data_ == nullptr) return;
  if (device_.kind == DeviceKind::kCuda)
    FreeGpu(device_, data_);
  else
    std::free(data_);
}

PinnedBuffer::PinnedBuffer(Device device, int64_t bytes) : bytes_(bytes), device_(device) {
  ANNULUS_CHECK(bytes >= 0);
  if (bytes == 0) return;
  data_ = device.kind == DeviceKind::kCuda ? AllocatePinned(device, bytes) : AllocateHost(bytes);
}

PinnedBuffer::PinnedBuffer(PinnedBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      device_(other.device_) {}

PinnedBuffer& PinnedBuffer::operator=(PinnedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(device_, other.device_);
  return *this;
}

PinnedBuffer::~PinnedBuffer() {
  if (data_ == nullptr) return;
  if (device_.kind == DeviceKind::kCuda)
    FreePinned(device_, data_);
  else
    std::free(data_);
}

Tensor::Tensor(Device device, DType dtype, Shape shape)
    : buffer_(device, shape.elements() * SizeOf(dtype)), dtype_(dtype), shape_(shape) {}

Arena::Arena(Device device) : device_(device) {}
Arena::Arena(Arena&& other) noexcept = default;
Arena::~Arena() = default;

TensorRef Arena::Allocate(DType dtype, Shape shape) {
  const int64_t bytes = std::max(RoundUp(shape.elements() * SizeOf(dtype)), kAlignmentBytes);
  char* data = device_.kind == DeviceKind::kCuda ? TakeFromRange(bytes) : TakeFromBlocks(bytes);
  position_.offset += bytes;
  high_water_bytes_ = std::max(high_water_bytes_, used_bytes());
  return {data, dtype, device_, shape};
}

char* Arena::TakeFromBlocks(int64_t bytes) {
  while (position_.block < blocks_.size() && position_.offset + bytes > blocks_[position_.block].bytes()) {
    ++position_.block;
    position_.offset = 0;
  }
  if (position_.block == blocks_.size()) blocks_.emplace_back(device_, std::max(bytes, kMinBlockBytes));
  return static_cast<char*>(blocks_[position_.block].data()) + position_.offset;
}

char* Arena::TakeFromRange(int64_t bytes) {
  if (range_ == nullptr) range_ = std::make_unique<GpuRange>(device_);
  const int64_t missing = position_.offset + bytes - range_->bytes();
  if (missing > 0) range_->Grow(missing);
  return range_->data() + position_.offset;
}

int64_t Arena::capacity_bytes() const {
  int64_t bytes = range_ == nullptr ? 0 : range_->bytes();
  for (const Buffer& block : blocks_) bytes += block.bytes();
  return bytes;
}

int64_t Arena::used_bytes() const {
  int64_t bytes = position_.offset;
  for (size_t i = 0; i < position_.block; ++i) bytes += blocks_[i].bytes();
  return bytes;
}

}  // namespace annulus
