#pragma once

// Device arrays of the attention check, with gaps, guards and poison.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "kernels/attention/attention_block_cuda.h"

namespace annulus::testing {

using kernels::CudaHeads;
using bf16 = __nv_bfloat16;

#define CUDA(call)                                                                           \
  do {                                                                                       \
    const cudaError_t error_ = (call);                                                       \
    if (error_ != cudaSuccess) {                                                             \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
      std::exit(1);                                                                          \
    }                                                                                        \
  } while (0)

inline size_t Size(int64_t n) { return static_cast<size_t>(n); }

template <typename T>
T FromDouble(double x) {
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16(static_cast<float>(x));
  if constexpr (!std::is_same_v<T, bf16>) return static_cast<T>(x);
}
inline double ToDouble(bf16 x) { return __bfloat162float(x); }
inline double ToDouble(float x) { return x; }
template <typename T>
double RoundTo(double x) {
  return ToDouble(FromDouble<T>(x));
}
inline double RoundNot(double x) { return x; }

template <typename T>
struct DeviceArray {
  T* data = nullptr;
  explicit DeviceArray(int64_t n) { CUDA(cudaMalloc(&data, Size(std::max<int64_t>(n, 1)) * sizeof(T))); }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(static_cast<int64_t>(host.size())) {
    CUDA(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data); }
};

// n dense elements on the device with a guard behind.
template <typename T>
class GuardedArray {
 public:
  explicit GuardedArray(std::vector<T> host) : size_(host.size()), array_(Guard(&host)) {}
  T* data() const { return array_.data; }

  // The elements; sets *intact to false when the guard was written.
  std::vector<T> Download(bool* intact) const {
    std::vector<T> host(size_ + kGuard);
    CUDA(cudaMemcpy(host.data(), array_.data, host.size() * sizeof(T), cudaMemcpyDeviceToHost));
    const T guard = FromDouble<T>(NAN);
    for (size_t i = size_; i < host.size(); ++i) {
      *intact = *intact && std::memcmp(&host[i], &guard, sizeof(T)) == 0;
    }
    host.resize(size_);
    return host;
  }

 private:
  static constexpr size_t kGuard = 64;
  static const std::vector<T>& Guard(std::vector<T>* host) {
    host->resize(host->size() + kGuard, FromDouble<T>(NAN));
    return *host;
  }
  const size_t size_;
  DeviceArray<T> array_;
};

// [rows, batch, width] on the device with gaps between rows and between items, and guard rows behind. The
// gaps hold NaN: read, they would poison results; written, the check of Download() sees it. With `far`, row
// strides of 2^25 elements and only the rows' own elements are set.
template <typename T>
class StridedHeads {
 public:
  StridedHeads(int64_t rows, int64_t batch, int64_t width, bool far)
      : rows_(rows),
        batch_(batch),
        width_(width),
        batch_stride_(width + 8),
        row_stride_(far ? (int64_t{1} << 25) + 64 : batch * batch_stride_ + 16),
        far_(far),
        array_((rows + (far ? 1 : 64)) * row_stride_) {}

  void Upload(const std::vector<T>& dense) {
    if (far_) {
      ForEachItem([&](int64_t at, int64_t from) {
        CUDA(cudaMemcpy(array_.data + at, &dense[Size(from)], Size(width_) * sizeof(T),
                        cudaMemcpyHostToDevice));
      });
      return;
    }
    std::vector<T> host(Size((rows_ + 64) * row_stride_), FromDouble<T>(NAN));
    ForEachItem(
        [&](int64_t at, int64_t from) { std::copy_n(dense.begin() + from, width_, host.begin() + at); });
    CUDA(cudaMemcpy(array_.data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }

  // The dense elements; sets *intact to false when a gap was written.
  std::vector<T> Download(bool* intact) const {
    std::vector<T> dense(Size(rows_ * batch_ * width_));
    if (far_) {
      ForEachItem([&](int64_t at, int64_t from) {
        CUDA(cudaMemcpy(&dense[Size(from)], array_.data + at, Size(width_) * sizeof(T),
                        cudaMemcpyDeviceToHost));
      });
      return dense;
    }
    std::vector<T> host(Size((rows_ + 64) * row_stride_));
    CUDA(cudaMemcpy(host.data(), array_.data, host.size() * sizeof(T), cudaMemcpyDeviceToHost));
    const T guard = FromDouble<T>(NAN);
    ForEachItem([&](int64_t at, int64_t from) {
      std::copy_n(host.begin() + at, width_, dense.begin() + from);
      std::fill_n(host.begin() + at, width_, guard);
    });
    for (const T& x : host) *intact = *intact && std::memcmp(&x, &guard, sizeof(T)) == 0;
    return dense;
  }

  template <typename U>
  CudaHeads<U> Heads(int64_t first = 0, int64_t step = 1) const {
    return {array_.data + first * row_stride_, row_stride_ * step, batch_stride_};
  }

 private:
  template <typename Fn>
  void ForEachItem(Fn&& fn) const {
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t item = 0; item < batch_; ++item) {
        fn(row * row_stride_ + item * batch_stride_, (row * batch_ + item) * width_);
      }
    }
  }
  const int64_t rows_, batch_, width_, batch_stride_, row_stride_;
  const bool far_;
  DeviceArray<T> array_;
};

template <typename T>
std::vector<T> Convert(const std::vector<double>& x) {
  std::vector<T> y(x.size());
  std::transform(x.begin(), x.end(), y.begin(), FromDouble<T>);
  return y;
}
template <typename T>
std::vector<double> Doubles(const std::vector<T>& x) {
  std::vector<double> y(x.size());
  std::transform(x.begin(), x.end(), y.begin(), [](T e) { return ToDouble(e); });
  return y;
}

}  // namespace annulus::testing
