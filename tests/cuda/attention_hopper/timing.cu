#include <functional>
#include <memory>
#include <string>

#include "cuda/attention_hopper/timed_shapes.h"
#include "cuda/attention_hopper/timing.h"
#include "cuda/attention_hopper/variants.h"
#include "cuda/attention_mma/timing.cuh"
#include "kernels/attention/attention_hopper.h"
#include "kernels/attention/attention_mma.h"

namespace annulus::testing {
namespace {

using kernels::HopperAttentionBlock;
using kernels::HopperAttentionPartial;

struct Timed {
  TimedShape shape;
  bool variants = false;
  int chunks = 1;  // of the keys, for the carry
};

constexpr Timed kTimed[] = {
    {{128, 128, 32768, 16, 16}, true},
    {{128, 128, 32768, 16, 16, TimedMask::kFull}, true},
    {{128, 128, 8192, 16, 16}, true},
    {{128, 128, 8192, 16, 16, TimedMask::kFull}, true},
    {{128, 128, 32768, 32, 8}},
    {{128, 128, 32768, 16, 16, TimedMask::kDocuments}, true},
    {{128, 128, 131072, 8, 8, TimedMask::kWindow}},
    {{128, 128, 65536, 8, 8, TimedMask::kFull}, true, 8},
    {{128, 128, 1024, 16, 16}, true},
    {{64, 64, 32768, 16, 16}, true},
    {{64, 64, 32768, 16, 16, TimedMask::kFull}, true},
    {{64, 64, 8192, 16, 16}, true},
    {{64, 64, 32768, 16, 16, TimedMask::kDocuments}, true},
    {{192, 128, 32768, 16, 16}, true},
    {{192, 128, 32768, 16, 16, TimedMask::kFull}, true},
    {{192, 128, 8192, 16, 16}, true},
    {{192, 128, 32768, 16, 16, TimedMask::kDocuments}, true},
};

// Some of n elements: the first, those in the middle and the last.
template <typename T>
std::vector<double> Sample(const T* data, int64_t n) {
  const int64_t some = std::min<int64_t>(n, 1 << 18);
  std::vector<T> host(Size(3 * some));
  for (const int64_t i : {0, 1, 2}) {
    CUDA(cudaMemcpy(&host[Size(i * some)], data + (n - some) / 2 * i, Size(some) * sizeof(T),
                    cudaMemcpyDeviceToHost));
  }
  return Doubles(host);
}

double Difference(const std::vector<double>& x, const std::vector<double>& y) {
  double square = 0, norm = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    square += (x[i] - y[i]) * (x[i] - y[i]);
    norm += y[i] * y[i];
  }
  return std::sqrt(square / norm);
}

// Clocks of a multiprocessor, and the time.
struct Tick {
  int64_t clocks = 0, ns = 0;
};
constexpr int kMostMultiprocessors = 256;

__global__ void ReadTicks(Tick* ticks) {
  unsigned multiprocessor;
  Tick tick;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(multiprocessor));
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(tick.ns)::"memory");
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(tick.clocks)::"memory");
  if (multiprocessor < kMostMultiprocessors) ticks[multiprocessor] = tick;
}

__global__ void FillMinusInfinity(float* x, int64_t n) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i < n) x[i] = -INFINITY;
}

class Timing {
 public:
  explicit Timing(const Timed& timed)
      : shape_(timed.shape),
        variants_(timed.variants),
        chunks_(timed.chunks),
        q_(shape_.rows * shape_.heads * shape_.dim),
        k_(shape_.rows * shape_.kv_heads * shape_.dim),
        v_(shape_.rows * shape_.kv_heads * shape_.v_dim),
        result_(shape_.rows * shape_.heads * shape_.v_dim),
        out_(shape_.rows * shape_.heads * shape_.v_dim),
        lse_(shape_.rows * shape_.heads),
        lo_(shape_.rows),
        hi_(shape_.rows),
        workspace_(kernels::HopperAttentionForwardWorkspaceBytes(
            {.q = {}, .k = {}, .v = {}, .q_rows = shape_.rows, .batch = 1, .heads = shape_.heads})) {
    FillRandom<<<1024, 256>>>(q_.data, shape_.rows * shape_.heads * shape_.dim, 1);
    FillRandom<<<1024, 256>>>(k_.data, shape_.rows * shape_.kv_heads * shape_.dim, 2);
    FillRandom<<<1024, 256>>>(v_.data, shape_.rows * shape_.kv_heads * shape_.v_dim, 3);
    std::vector<int64_t> lo, hi;
    flop_ = FillTimedBounds(shape_, &lo, &hi) * static_cast<double>(shape_.heads) * 2 *
            static_cast<double>(shape_.dim + shape_.v_dim);
    CUDA(cudaMemcpy(lo_.data, lo.data(), lo.size() * 8, cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(hi_.data, hi.data(), hi.size() * 8, cudaMemcpyHostToDevice));
    block_ = TimedBlock(shape_, q_.data, k_.data, v_.data, lo_.data, hi_.data);
    partial_ = {.out = {out_.data, shape_.heads * shape_.v_dim, shape_.heads * shape_.v_dim},
                .lse = lse_.data,
                .result = {}};
    whole_ = {.out = {},
              .lse = lse_.data,
              .result = {result_.data, partial_.out.row_stride, partial_.out.row_stride}};
  }

  bool Run() {
    std::printf("%3ld/%-3ld %-16s %6ld rows %2ld/%-2ld heads, keys in %d\n", long(shape_.dim),
                long(shape_.v_dim), Name(shape_.mask), long(shape_.rows), long(shape_.heads),
                long(shape_.kv_heads), chunks_);
    Reset();
    CUDA(kernels::MmaAttentionForward(block_, partial_, nullptr));
    const int64_t size = shape_.rows * shape_.heads * shape_.v_dim, stats = shape_.rows * shape_.heads;
    const std::vector<double> out = Sample(out_.data, size), lse = Sample(lse_.data, stats);
    AddAlternatives();
    bool ok = true;
    for (const Alternative& alternative : alternatives_) {
      CUDA(cudaMemset(result_.data, 0xFF, Size(size) * 2));
      CUDA(cudaMemset(out_.data, 0xFF, Size(size) * 4));
      CUDA(cudaMemset(lse_.data, 0xFF, Size(stats) * 4));
      alternative.run();
      if (alternative.to == Output::kUnchecked) continue;
      const std::vector<double> got =
          alternative.to == Output::kResult ? Sample(result_.data, size) : Sample(out_.data, size);
      const double differences[] = {Difference(got, out), Difference(Sample(lse_.data, stats), lse)};
      // bf16 rounds to 2^-9, 1.1e-3 of the norm of random numbers; weights of both kernels are rounded apart.
      if (differences[0] < 4e-3 && differences[1] < 1e-5) continue;
      std::printf("    FAIL %s against mma: O %.1e, LSE %.1e\n", alternative.name.c_str(), differences[0],
                  differences[1]);
      ok = false;
    }
    // All in turn, there and back: clocks follow the power of what ran before.
    for (int round = 0; round < kRounds; ++round) {
      for (size_t i = 0; i < alternatives_.size(); ++i) {
        Time(&alternatives_[round % 2 == 0 ? i : alternatives_.size() - 1 - i]);
      }
    }
    for (Alternative& alternative : alternatives_) Print(&alternative);
    return ok;
  }

 private:
  enum class Output { kResult, kPartial, kUnchecked };
  struct Alternative {
    std::string name;
    std::function<void()> run;
    Output to;
    std::vector<double> seconds{}, ghz{};
  };
  static constexpr int kRounds = 7;

  void AddAlternatives() {
    Add("whole", HopperForward);
    for (int i = 0; variants_ && i < kHopperForwardVariantCount; ++i) {
      if (kHopperForwardVariants[i].dim == shape_.dim) {
        Add(kHopperForwardVariants[i].name, kHopperForwardVariants[i].kernel.launch);
      }
    }
    AddCudnn();
  }

  static cudaError_t HopperForward(const HopperAttentionBlock& block, const HopperAttentionPartial& partial,
                                   void* workspace, cudaStream_t stream) {
    return partial.out.data == nullptr
               ? kernels::HopperAttentionForwardWhole(block, partial.result, partial.lse, workspace, stream)
               : kernels::HopperAttentionForward(block, partial, workspace, stream);
  }

  void Add(const std::string& name, kernels::HopperForwardLauncher* launch) {
    alternatives_.push_back(
        {name, [=, this] { CUDA(launch(block_, whole_, workspace_.data, nullptr)); }, Output::kResult});
    if (name != "whole" && chunks_ == 1) return;
    alternatives_.push_back({name + ", carry",
                             [=, this] {
                               Reset();
                               CUDA(launch(block_, partial_, workspace_.data, nullptr));
                             },
                             Output::kPartial});
    if (chunks_ == 1) return;
    alternatives_.push_back({name + ", chunks", [=, this] { Chunks(launch); }, Output::kPartial});
  }

  void Time(Alternative* alternative) {
    cudaEvent_t start, stop;
    CUDA(cudaEventCreate(&start));
    CUDA(cudaEventCreate(&stop));
    ReadTicks<<<kMostMultiprocessors, 1>>>(ticks_.data);
    CUDA(cudaEventRecord(start));
    alternative->run();
    CUDA(cudaEventRecord(stop));
    ReadTicks<<<kMostMultiprocessors, 1>>>(ticks_.data + kMostMultiprocessors);
    CUDA(cudaDeviceSynchronize());
    float ms;
    CUDA(cudaEventElapsedTime(&ms, start, stop));
    Tick ticks[2][kMostMultiprocessors];
    CUDA(cudaMemcpy(ticks, ticks_.data, sizeof(ticks), cudaMemcpyDeviceToHost));
    alternative->seconds.push_back(ms * 1e-3);
    alternative->ghz.push_back(static_cast<double>(ticks[1][0].clocks - ticks[0][0].clocks) /
                               static_cast<double>(ticks[1][0].ns - ticks[0][0].ns));
    CUDA(cudaEventDestroy(start));
    CUDA(cudaEventDestroy(stop));
  }

  // Medians; the last column is the part of the tensor cores' clocks that the products fill.
  void Print(Alternative* alternative) const {
    const auto median = [](std::vector<double>* x) {
      std::sort(x->begin(), x->end());
      return (*x)[x->size() / 2];
    };
    const double seconds = median(&alternative->seconds), ghz = median(&alternative->ghz);
    constexpr double kFlopPerClock = 4096.0 * 132;
    std::printf("    %-26s %9.3f ms %7.1f TFLOP/s  best %7.1f  %.2f GHz %5.1f%%\n", alternative->name.c_str(),
                seconds * 1e3, flop_ / seconds * 1e-12, flop_ / alternative->seconds[0] * 1e-12, ghz,
                flop_ / seconds / (ghz * 1e9 * kFlopPerClock) * 100);
  }

  // No keys seen.
  void Reset() {
    const int64_t n = shape_.rows * shape_.heads;
    FillMinusInfinity<<<static_cast<unsigned>((n + 255) / 256), 256>>>(lse_.data, n);
  }

  void Chunks(kernels::HopperForwardLauncher* launch) {
    Reset();
    const int64_t rows = shape_.rows / chunks_;
    for (int64_t first = 0; first < shape_.rows; first += rows) {
      HopperAttentionBlock chunk = block_;
      chunk.k.data += first * chunk.k.row_stride;
      chunk.v.data += first * chunk.v.row_stride;
      chunk.k_rows = rows;
      chunk.key_offset = first;
      CUDA(launch(chunk, partial_, workspace_.data, nullptr));
    }
  }

  void AddCudnn() {
#if ANNULUS_HAS_CUDNN
    if (!CudnnKnows(shape_.mask)) return;
    auto created = kernels::CudnnAttention::Create();
    if (!created.ok()) {
      std::printf("    cuDNN: %s\n", std::string(created.status().message()).c_str());
      return;
    }
    const std::shared_ptr<kernels::CudnnAttention> library = *std::move(created);
    const kernels::CudnnBlock block = CudnnBlockOf(shape_, block_.scale);
    const auto bytes = library->ForwardWorkspaceBytes(block);
    if (!bytes.ok()) {
      std::printf("    cuDNN: %s\n", std::string(bytes.status().message()).c_str());
      return;
    }
    const auto workspace = std::make_shared<DeviceArray<char>>(*bytes);
    alternatives_.push_back({"cuDNN",
                             [=, this] {
                               const absl::Status status = library->Forward(
                                   block, {q_.data, k_.data, v_.data, result_.data, lse_.data},
                                   {workspace->data, *bytes, nullptr});
                               if (!status.ok())
                                 std::printf("    cuDNN: %s\n", std::string(status.message()).c_str());
                             },
                             Output::kUnchecked});
#endif
  }

  const TimedShape shape_;
  const bool variants_;
  const int chunks_;
  const DeviceArray<bf16> q_, k_, v_, result_;
  const DeviceArray<float> out_, lse_;
  const DeviceArray<int64_t> lo_, hi_;
  const DeviceArray<char> workspace_;
  HopperAttentionBlock block_;
  HopperAttentionPartial partial_, whole_;
  const DeviceArray<Tick> ticks_{2 * kMostMultiprocessors};
  std::vector<Alternative> alternatives_;
  double flop_ = 0;
};

}  // namespace

bool TimeForward() {
  bool ok = true;
  for (const Timed& timed : kTimed) ok = Timing(timed).Run() && ok;
  return ok;
}

}  // namespace annulus::testing
