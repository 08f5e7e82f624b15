#pragma once

// Arrays with guards and poison, comparison with f64, and timing for the check program.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace annulus::testing {

using Bf16 = __nv_bfloat16;
using Doubles = std::vector<double>;

inline void Must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FATAL %s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}
inline int g_checks = 0, g_failures = 0;
inline cudaStream_t g_stream = nullptr;

inline void Expect(bool ok, const std::string& what) {
  ++g_checks;
  if (ok) return;
  ++g_failures;
  std::printf("FAIL  %s\n", what.c_str());
}

template <typename Status>
void Ok(const Status& status) {
  Expect(status.ok(), "status: " + std::string(status.message()));
}

template <typename T>
double Value(T x) {
  if constexpr (sizeof(T) == 2)
    return __bfloat162float(x);
  else
    return static_cast<double>(x);
}
template <typename T>
T Round(double x) {
  if constexpr (sizeof(T) == 2)
    return __float2bfloat16(static_cast<float>(x));
  else
    return static_cast<T>(x);
}
template <typename T>
const char* NameOf() {
  return sizeof(T) == 2 ? "bf16" : "f32";
}
template <typename T>
Doubles Rounded(Doubles values) {
  for (double& x : values) x = Value(Round<T>(x));
  return values;
}

// Device array between two guards; filled with NaN bytes unless uploaded. `shift` elements off alignment.
template <typename T>
class Array {
 public:
  explicit Array(int64_t n, int64_t shift = 0) : n_(n), shift_(shift) {
    bytes_ = static_cast<size_t>(n + shift) * sizeof(T) + 2 * kGuard;
    Must(cudaMalloc(&base_, bytes_), "cudaMalloc");
    Must(cudaMemset(base_, 0xA5, bytes_), "memset");
    Must(cudaMemset(data(), 0xFF, static_cast<size_t>(n) * sizeof(T)), "memset");
  }
  Array(const Doubles& values, int64_t shift = 0) : Array(static_cast<int64_t>(values.size()), shift) {
    Upload(values);
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(base_); }
  void Upload(const Doubles& values) {
    std::vector<T> host(values.size());
    for (size_t i = 0; i < values.size(); ++i) host[i] = Round<T>(values[i]);
    Must(cudaMemcpy(data(), host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
  }
  T* data() const { return reinterpret_cast<T*>(base_ + kGuard) + shift_; }
  int64_t size() const { return n_; }
  Doubles Get(const std::string& what) const {
    Must(cudaDeviceSynchronize(), what.c_str());
    std::vector<char> raw(bytes_);
    Must(cudaMemcpy(raw.data(), base_, bytes_, cudaMemcpyDeviceToHost), what.c_str());
    const size_t begin = kGuard + static_cast<size_t>(shift_) * sizeof(T),
                 end = begin + static_cast<size_t>(n_) * sizeof(T);
    bool intact = true;
    for (size_t i = 0; i < bytes_; ++i) {
      if ((i < begin || i >= end) && static_cast<unsigned char>(raw[i]) != 0xA5) intact = false;
    }
    Expect(intact, what + ": guard overwritten");
    Doubles out(static_cast<size_t>(n_));
    for (size_t i = 0; i < out.size(); ++i) {
      T x;
      std::memcpy(&x, raw.data() + begin + i * sizeof(T), sizeof(T));
      out[i] = Value(x);
    }
    return out;
  }

 private:
  static constexpr size_t kGuard = 1024;
  char* base_ = nullptr;
  size_t bytes_ = 0;
  int64_t n_, shift_;
};

inline std::mt19937_64& Rng() {
  static std::mt19937_64 rng(20240607);
  return rng;
}
// Roughly normal values as T holds them.
template <typename T>
Doubles Random(int64_t n, double scale = 1) {
  Doubles x(static_cast<size_t>(n));
  for (double& v : x) {  // the sum of four uniform values: close enough to normal, and quick
    const uint64_t bits = Rng()();
    const double sum =
        static_cast<double>((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48));
    v = Value(Round<T>(scale * (sum - 131070) * 2.643e-5));
  }
  return x;
}

// Worst use of what the rule allows, of every name, for the table.
struct Row {
  std::string name;
  double error = 0, allowed = 0;
  int cases = 0;
};
inline std::vector<Row>& Table() {
  static std::vector<Row> table;
  return table;
}

// max |got - wide| <= 2 max |naive - wide| + 4 f32 epsilons of the largest value; naive is the same
// arithmetic in the tested type, wide in f64.
inline void Compare(const std::string& name, const std::string& detail, const Doubles& got,
                    const Doubles& naive, const Doubles& wide) {
  double error = 0, naive_error = 0, largest = 0;
  for (size_t i = 0; i < wide.size(); ++i) {
    const double difference = std::abs(got[i] - wide[i]);
    error = std::isnan(difference) ? INFINITY : std::max(error, difference);
    naive_error = std::max(naive_error, std::abs(naive[i] - wide[i]));
    largest = std::max(largest, std::abs(wide[i]));
  }
  const double allowed = 2 * naive_error + 4 * 0x1p-23 * largest;
  char text[96];
  std::snprintf(text, sizeof(text), ": error %.3g, allowed %.3g", error, allowed);
  Expect(got.size() == wide.size() && error <= allowed, name + " " + detail + text);
  auto row = std::find_if(Table().begin(), Table().end(), [&](const Row& r) { return r.name == name; });
  if (row == Table().end()) row = Table().insert(row, {.name = name});
  const auto used = [](double e, double of) { return e == 0 ? 0 : e / of; };
  if (used(error, allowed) >= used(row->error, row->allowed) && allowed > 0) {
    row->error = error, row->allowed = allowed;
  }
  ++row->cases;
}

// Keeps the device busy for that long.
void KeepBusy(double microseconds);

// Median milliseconds of `repeats` runs, after so many that clocks have risen: a device that has been idle is
// slower for milliseconds. The device is busy until all is enqueued, as it is in a step: what the host takes
// for a launch is not part of the time.
template <typename Fn>
double Milliseconds(int repeats, Fn&& fn) {
  constexpr double kWarmUpMilliseconds = 10;
  cudaEvent_t start, stop;
  cudaEventCreate(&start);
  cudaEventCreate(&stop);
  const auto once = [&] {
    KeepBusy(200);
    cudaEventRecord(start, g_stream);
    fn();
    cudaEventRecord(stop, g_stream);
    Must(cudaEventSynchronize(stop), "timed kernel");
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    return static_cast<double>(ms);
  };
  once();
  for (double spent = 0; spent < kWarmUpMilliseconds;) spent += once();
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) times.push_back(once());
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void FillNormal(Bf16* x, int64_t n, float scale, uint32_t seed);
void FillNormal(float* x, int64_t n, float scale, uint32_t seed);

void CheckElementwise();
void CheckLinear();
void CheckAttention();
void TimeElementwise();
void TimeStateSpace();
void TimeLinear();
void TimeAttention();

}  // namespace annulus::testing
