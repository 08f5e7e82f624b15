// One rank's forward of P in a ring: its queries against the keys of all, of which the others' arrive in
// equal chunks one behind the other. Times are those of the device from the launch to the end.
//
// At a given rate: keys lie there from the start, and a host thread raises flags at the times at which a link
// of that rate would have brought them, so what the copies themselves would take of the memory's bandwidth is
// left out. "host copies": pinned memory, by the copy engine over PCIe, at whatever rate that gives.
//
// Ideal: after each arrival t, no less than t + what the chunks from then on take of the time of one launch
// over all keys.

#include <memory>
#include <string>

#include "cuda/attention_hopper/arena_stream.cuh"
#include "cuda/attention_hopper/arena_time.h"
#include "cuda/attention_mma/timing.cuh"
#include "kernels/attention/attention_hopper_arena.h"

namespace annulus::testing {
namespace {

using kernels::HopperArenaChunk;
using kernels::HopperAttentionBlock;

struct Shape {
  const char* name;
  int64_t q_rows, ranks, heads, kv_heads;
  bool causal;  // zigzag: rank r has segments r and 2 ranks - 1 - r; else full
};
constexpr int64_t kDim = 128;
constexpr int kRank = 3;
constexpr int kRepeats = 9;
constexpr Shape kShapes[] = {
    {"full gqa", 8192, 8, 32, 8, false},
    {"full", 4096, 8, 16, 16, false},
    {"causal zigzag", 8192, 8, 16, 16, true},
};

__global__ void FillMinusInfinity(float* x, int64_t n) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i < n) x[i] = -INFINITY;
}

// What comes at one time.
struct Arrival {
  std::vector<size_t> chunks;
  double bytes = 0;
  double pairs = 0;
};

class Timing {
 public:
  explicit Timing(const Shape& shape)
      : s_(shape),
        k_rows_(shape.q_rows * shape.ranks),
        q_(shape.q_rows * shape.heads * kDim),
        k_(k_rows_ * shape.kv_heads * kDim),
        v_(k_rows_ * shape.kv_heads * kDim),
        result_(shape.q_rows * shape.heads * kDim),
        out_(shape.q_rows * shape.heads * kDim),
        lse_(shape.q_rows * shape.heads),
        lo_(std::vector<int64_t>(Size(shape.q_rows), 0)),
        hi_(shape.q_rows),
        flags_(std::vector<uint32_t>(Size(shape.ranks), 0)) {
    FillRandom<<<1024, 256>>>(q_.data, s_.q_rows * s_.heads * kDim, 1);
    FillRandom<<<1024, 256>>>(k_.data, k_rows_ * s_.kv_heads * kDim, 2);
    FillRandom<<<1024, 256>>>(v_.data, k_rows_ * s_.kv_heads * kDim, 3);
    MakeChunks();
    workspace_ = std::make_unique<DeviceArray<char>>(
        std::max(kernels::HopperAttentionForwardArenaWorkspaceBytes({.block = block_, .chunks = chunks_}),
                 kernels::HopperAttentionForwardWorkspaceBytes(block_)));
    CUDA(cudaDeviceSynchronize());
  }

  bool Run() {
    const double flop = pairs_ * static_cast<double>(s_.heads) * 4 * kDim;
    std::printf("%s: %ld queries, %ld keys in %ld parts, heads %ld/%ld of %ld\n", s_.name, long(s_.q_rows),
                long(k_rows_), long(s_.ranks), long(s_.heads), long(s_.kv_heads), long(kDim));
    const auto print = [&](const std::string& name, double seconds, const std::string& more) {
      std::printf("    %-36s %8.3f ms %7.1f TFLOP/s%s\n", name.c_str(), seconds * 1e3, flop / seconds * 1e-12,
                  more.c_str());
    };
    const double whole = Median([&] { Whole(); }, {});
    const std::vector<bf16> want = Download();
    print("one launch over all", whole, "");
    print("arena, all there", Median([&] { Arena(); }, {.at_once = true}), "");
    bool ok = Agrees(want);
    print("a launch per part, all there", Median([&] { Ring(); }, {.at_once = true}), "");
    ok = Agrees(want) && ok;
    for (const double gb_per_s : {100., 200., 400.}) {
      std::string rate = std::to_string(static_cast<int>(gb_per_s)) + " GB/s, ";
      std::vector<double> times;
      double t = 0;
      for (size_t i = 1; i < arrivals_.size(); ++i)
        times.push_back(t += arrivals_[i].bytes / gb_per_s * 1e-9);
      print(rate + "ideal", Ideal(whole, times), "");
      print(rate + "arena", Median([&] { Arena(); }, {.times = times}), "");
      ok = Agrees(want) && ok;
      print(rate + "a launch per part", Median([&] { Ring(); }, {.times = times}), "");
      ok = Agrees(want) && ok;
    }
    return HostCopies(print, want) && ok;
  }

 private:
  // How flags are raised behind the launch.
  struct Schedule {
    std::vector<double> times{};  // s, of the arrivals but the first
    bool at_once = false;         // before the launch
    bool copies = false;          // behind copies from the host
  };

  void MakeChunks() {
    const int64_t width = s_.kv_heads * kDim, q_width = s_.heads * kDim;
    block_ = {.q = {q_.data, q_width, q_width},
              .k = {k_.data, width, width},
              .v = {v_.data, width, width},
              .q_rows = s_.q_rows,
              .k_rows = k_rows_,
              .batch = 1,
              .heads = s_.heads,
              .kv_heads = s_.kv_heads,
              .dim = kDim,
              .v_dim = kDim,
              .lo = lo_.data,
              .hi = hi_.data,
              .scale = static_cast<float>(1 / std::sqrt(double(kDim)))};
    const int64_t segments = s_.causal ? 2 : 1, rows = s_.q_rows / segments;
    std::vector<int64_t> hi;
    for (int64_t i = 0; i < s_.q_rows; ++i) {
      const int64_t segment = i / rows == 0 ? kRank : 2 * s_.ranks - 1 - kRank;
      hi.push_back(s_.causal ? segment * rows + i % rows + 1 : k_rows_);
      pairs_ += static_cast<double>(hi.back());
    }
    CUDA(cudaMemcpy(hi_.data, hi.data(), hi.size() * 8, cudaMemcpyHostToDevice));
    // Its own keys first, then the others' from rank to rank.
    for (int64_t step = 0; step < s_.ranks; ++step) {
      const int64_t rank = (kRank + s_.ranks - step) % s_.ranks;
      Arrival arrival;
      for (int64_t i = 0; i < segments; ++i) {
        const int64_t segment = i == 0 ? rank : 2 * s_.ranks - 1 - rank;
        HopperArenaChunk chunk{.first_row = segment * rows, .rows = rows, .key_offset = segment * rows};
        if (step > 0) chunk.arrived = flags_.data + step;
        arrival.chunks.push_back(chunks_.size());
        arrival.bytes += static_cast<double>(rows * width * 2 * 2);
        for (const int64_t h : hi) {
          arrival.pairs += static_cast<double>(std::clamp<int64_t>(h - chunk.key_offset, 0, rows));
        }
        chunks_.push_back(chunk);
      }
      arrivals_.push_back(arrival);
    }
  }

  double Ideal(double whole, const std::vector<double>& times) const {
    double longest = whole, left = 0;
    for (size_t i = times.size(); i > 0; --i) {
      left += arrivals_[i].pairs / pairs_ * whole;
      if (arrivals_[i].pairs > 0) longest = std::max(longest, times[i - 1] + left);
    }
    return longest;
  }

  void Whole() {
    CUDA(kernels::HopperAttentionForwardWhole(block_, Result(), lse_.data, workspace_->data, compute_.get()));
  }
  void Arena() {
    for (HopperArenaChunk& chunk : chunks_) chunk.awaited = round_;
    CUDA(kernels::HopperAttentionForwardArena({.block = block_, .chunks = chunks_, .patience_ms = 2000},
                                              {Out(), lse_.data, Result()}, workspace_->data,
                                              compute_.get()));
  }
  void Ring() {
    const int64_t n = s_.q_rows * s_.heads;
    FillMinusInfinity<<<static_cast<unsigned>((n + 255) / 256), 256, 0, compute_.get()>>>(lse_.data, n);
    for (size_t i = 0; i < arrivals_.size(); ++i) {
      if (arrivals_[i].pairs == 0 && i + 1 < arrivals_.size()) continue;
      if (i > 0) compute_.Wait(flags_.data + i, round_);
      for (const size_t c : arrivals_[i].chunks) {
        HopperAttentionBlock block = block_;
        block.k.data += chunks_[c].first_row * block.k.row_stride;
        block.v.data += chunks_[c].first_row * block.v.row_stride;
        block.k_rows = chunks_[c].rows;
        block.key_offset = chunks_[c].key_offset;
        const bool last = c + 1 == chunks_.size();
        CUDA(kernels::HopperAttentionForward(block,
                                             {Out(), lse_.data, last ? Result() : kernels::CudaHeads<bf16>{}},
                                             workspace_->data, compute_.get()));
      }
    }
  }

  void Raise(const Schedule& schedule, Clock::time_point start) {
    for (size_t i = 1; i < arrivals_.size(); ++i) {
      if (!schedule.times.empty()) {
        BusyWaitUntil(start + std::chrono::nanoseconds(static_cast<int64_t>(schedule.times[i - 1] * 1e9)));
      }
      if (schedule.copies) {
        for (const size_t c : arrivals_[i].chunks) Copy(chunks_[c]);
      }
      copies_.Write(flags_.data + i, round_);
    }
  }
  void Copy(const HopperArenaChunk& chunk) {
    const size_t width = Size(s_.kv_heads * kDim), at = Size(chunk.first_row) * width,
                 bytes = Size(chunk.rows) * width * sizeof(bf16);
    CUDA(cudaMemcpyAsync(k_.data + at, host_k_ + at, bytes, cudaMemcpyHostToDevice, copies_.get()));
    CUDA(cudaMemcpyAsync(v_.data + at, host_v_ + at, bytes, cudaMemcpyHostToDevice, copies_.get()));
  }

  // Seconds from launch to end.
  template <typename Fn>
  double Once(Fn&& launch, const Schedule& schedule) {
    cudaEvent_t start, stop;
    CUDA(cudaEventCreate(&start));
    CUDA(cudaEventCreate(&stop));
    ++round_;
    if (schedule.at_once) Raise({}, Clock::now());
    if (schedule.copies) {  // nothing that was there before may help
      CUDA(cudaMemset(k_.data + LocalEnd(), 0xFF, LocalRest()));
      CUDA(cudaMemset(v_.data + LocalEnd(), 0xFF, LocalRest()));
    }
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaEventRecord(start, compute_.get()));
    const auto begin = Clock::now();
    std::thread raise;
    if (!schedule.at_once) raise = std::thread([&, begin] { Raise(schedule, begin); });
    launch();
    CUDA(cudaEventRecord(stop, compute_.get()));
    if (raise.joinable()) raise.join();
    CUDA(cudaDeviceSynchronize());
    float ms;
    CUDA(cudaEventElapsedTime(&ms, start, stop));
    CUDA(cudaEventDestroy(start));
    CUDA(cudaEventDestroy(stop));
    return ms * 1e-3;
  }
  template <typename Fn>
  double Median(Fn&& launch, const Schedule& schedule) {
    CUDA(cudaMemset(result_.data, 0xFF, Size(s_.q_rows * s_.heads * kDim) * sizeof(bf16)));
    std::vector<double> seconds;
    for (int i = 0; i < kRepeats; ++i) seconds.push_back(Once(launch, schedule));
    std::sort(seconds.begin(), seconds.end());
    return seconds[seconds.size() / 2];
  }

  // Of a full shape: elements behind rank 3's keys, which are the last four ranks'.
  int64_t LocalEnd() const { return (kRank + 1) * s_.q_rows * s_.kv_heads * kDim; }
  size_t LocalRest() const { return Size(k_rows_ * s_.kv_heads * kDim - LocalEnd()) * sizeof(bf16); }

  template <typename Print>
  bool HostCopies(Print&& print, const std::vector<bf16>& want) {
    if (s_.causal) return true;
    const size_t bytes = Size(k_rows_ * s_.kv_heads * kDim) * sizeof(bf16);
    for (const auto& [host, device] : {std::pair{&host_k_, k_.data}, {&host_v_, v_.data}}) {
      CUDA(cudaMallocHost(reinterpret_cast<void**>(host), bytes));
      CUDA(cudaMemcpy(*host, device, bytes, cudaMemcpyDeviceToHost));
    }
    double copied = 0;
    for (size_t i = 1; i < arrivals_.size(); ++i) copied += arrivals_[i].bytes;
    const auto start = Clock::now();
    ++round_;
    Raise({.copies = true}, start);
    CUDA(cudaDeviceSynchronize());
    const double alone = std::chrono::duration<double>(Clock::now() - start).count();
    char rate[60];
    std::snprintf(rate, sizeof rate, "  copies alone %.3f ms, %.1f GB/s", alone * 1e3, copied / alone * 1e-9);
    print("host copies, arena", Median([&] { Arena(); }, {.copies = true}), rate);
    bool ok = Agrees(want);
    print("host copies, a launch per part", Median([&] { Ring(); }, {.copies = true}), "");
    ok = Agrees(want) && ok;
    CUDA(cudaFreeHost(host_k_));
    CUDA(cudaFreeHost(host_v_));
    return ok;
  }

  std::vector<bf16> Download() const {
    std::vector<bf16> host(Size(s_.q_rows * s_.heads * kDim));
    CUDA(cudaMemcpy(host.data(), result_.data, host.size() * sizeof(bf16), cudaMemcpyDeviceToHost));
    return host;
  }
  // Both round weights and results to bf16, 2^-9: 1.1e-3 of the norm each.
  bool Agrees(const std::vector<bf16>& want) const {
    const std::vector<bf16> got = Download();
    double square = 0, norm = 0;
    for (size_t i = 0; i < want.size(); i += 7) {
      const double difference = ToDouble(got[i]) - ToDouble(want[i]);
      square += difference * difference;
      norm += ToDouble(want[i]) * ToDouble(want[i]);
    }
    const double relative = std::sqrt(square / norm);
    const bool ok = relative < 4e-3;
    if (!ok) std::printf("    FAIL against one launch over all: %.1e\n", relative);
    return ok;
  }

  kernels::CudaHeads<bf16> Result() const { return {result_.data, s_.heads * kDim, s_.heads * kDim}; }
  kernels::CudaHeads<float> Out() const { return {out_.data, s_.heads * kDim, s_.heads * kDim}; }

  const Shape s_;
  const int64_t k_rows_;
  const DeviceArray<bf16> q_, k_, v_, result_;
  const DeviceArray<float> out_, lse_;
  const DeviceArray<int64_t> lo_, hi_;
  const DeviceArray<uint32_t> flags_;
  std::unique_ptr<DeviceArray<char>> workspace_;
  const FlagStream compute_, copies_;
  HopperAttentionBlock block_;
  std::vector<HopperArenaChunk> chunks_;
  std::vector<Arrival> arrivals_;
  bf16 *host_k_ = nullptr, *host_v_ = nullptr;
  double pairs_ = 0;
  uint32_t round_ = 0;
};

}  // namespace

bool TimeArena() {
  bool ok = true;
  for (const Shape& shape : kShapes) ok = Timing(shape).Run() && ok;
  return ok;
}

}  // namespace annulus::testing
