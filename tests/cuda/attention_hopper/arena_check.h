#pragma once

// Problems of block attention whose keys arrive in chunks in an arena (attention_hopper_arena.h).

#include <functional>
#include <memory>

#include "cuda/attention_mma/cases.h"
#include "kernels/attention/attention_hopper_arena.h"

namespace annulus::testing {

// Which keys arrive together: neighbours; every P-th; or two segments, the p-th from the front and from the
// back.
enum class ArenaSplit { kNeighbours, kStriped, kZigzag };

// n elements on the host, from which the copy engine copies by itself.
template <typename T>
struct PinnedArray {
  T* data = nullptr;
  explicit PinnedArray(int64_t n) {
    CUDA(cudaMallocHost(reinterpret_cast<void**>(&data), Size(n) * sizeof(T)));
    std::uninitialized_default_construct_n(data, n);
  }
  PinnedArray(const PinnedArray&) = delete;
  ~PinnedArray() { cudaFreeHost(data); }
};

struct ArenaCopy {
  void* to;
  const void* from;  // pinned
  size_t bytes;
};
struct ArenaArrival {
  std::vector<ArenaCopy> copies;
  uint32_t* flag;
  uint32_t value;
};

// Makes arrivals happen in their order while a launch runs. `finish` returns when they all have.
struct ArenaTransport {
  std::function<void(const std::vector<ArenaArrival>&)> start;
  std::function<void()> finish;
};

struct ArenaPlan {
  ArenaSplit split = ArenaSplit::kNeighbours;
  std::vector<int> order{};  // in which parts arrive; those that it leaves out are there from the start
  int never = -1;            // a part that never arrives
  bool rounded = true;       // the output is bf16, not f32
  int64_t patience_ms = 20'000;
};

// Of naive errors: orders of arrival take as many references of a row's weights.
inline constexpr uint32_t kArenaRealizations = 6;

class ArenaProblem {
 public:
  // c.chunks: of how many parts that arrive. prepared: of kArenaRealizations.
  ArenaProblem(const Prepared& prepared, const ArenaPlan& plan);

  // One launch from poisoned memory, compared with the double reference by the largest naive error of the
  // realizations, and a line on stdout.
  bool Check(const ArenaTransport& transport);
  // One launch without the part `never`; false unless it ends with an error and a report that names it.
  bool CheckGivesUp(const ArenaTransport& transport);

 private:
  void MakeChunks();
  std::vector<double> WorstNaiveOut() const;
  std::vector<ArenaArrival> Poison();
  kernels::HopperAttentionArena Arena() const;
  cudaError_t Launch(const ArenaTransport& transport);

  const Prepared& prepared_;
  const Case& c_;
  const ArenaPlan plan_;
  std::vector<kernels::HopperArenaChunk> chunks_;
  std::vector<int> part_;            // of each chunk
  const int64_t k_width_, v_width_;  // of rows of the arena
  const int64_t rows_;               // of the arena
  PinnedArray<bf16> keys_, values_;  // the arena with everything there; NaN between chunks
  DeviceArray<bf16> q_, k_, v_;
  DeviceArray<int64_t> lo_, hi_;
  DeviceArray<uint32_t> flags_;  // of the parts
  StridedHeads<float> out_;
  StridedHeads<bf16> result_;
  GuardedArray<float> lse_;
  std::unique_ptr<DeviceArray<char>> workspace_;
  PinnedArray<kernels::HopperArenaReport> report_{1};
};

}  // namespace annulus::testing
