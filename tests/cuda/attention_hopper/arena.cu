#include <random>

#include "cuda/attention_hopper/arena.h"
#include "cuda/attention_hopper/arena_check.h"
#include "cuda/attention_hopper/arena_stream.cuh"
#include "cuda/attention_hopper/arena_time.h"

namespace annulus::testing {
namespace {

constexpr int kRepeats = 24;

// Copies from pinned memory, each behind a delay of up to 400 us, one in eight of up to 4 ms.
class DelayedCopies {
 public:
  explicit DelayedCopies(uint32_t seed) : rng_(seed) {}
  ArenaTransport Transport() {
    return {[this](const std::vector<ArenaArrival>& arrivals) {
              thread_ = std::thread([this, arrivals] { Copy(arrivals); });
            },
            [this] {
              thread_.join();
              cudaStreamSynchronize(stream_.get());
            }};
  }

 private:
  void Copy(const std::vector<ArenaArrival>& arrivals) {
    for (const ArenaArrival& arrival : arrivals) {
      BusyWaitUntil(Clock::now() + std::chrono::microseconds(rng_() % (rng_() % 8 == 0 ? 4000 : 400)));
      for (const ArenaCopy& copy : arrival.copies) {
        CUDA(cudaMemcpyAsync(copy.to, copy.from, copy.bytes, cudaMemcpyHostToDevice, stream_.get()));
      }
      stream_.Write(arrival.flag, arrival.value);
    }
  }

  FlagStream stream_;
  std::mt19937 rng_;
  std::thread thread_;
};

bool CheckRepeats(const Prepared& prepared, ArenaSplit split, uint32_t seed) {
  std::mt19937 rng(seed);
  bool ok = true;
  for (int i = 0; i < kRepeats; ++i) {
    ArenaPlan plan{.split = split, .rounded = i % 4 != 3};
    for (int part = i % 2; part < prepared.c.chunks; ++part) plan.order.push_back(part);
    std::shuffle(plan.order.begin(), plan.order.end(), rng);
    ArenaProblem problem(prepared, plan);
    DelayedCopies copies(static_cast<uint32_t>(rng()));
    ok = problem.Check(copies.Transport()) && ok;
  }
  return ok;
}

bool CheckAll() {
  std::vector<Case> cases;
  std::vector<ArenaSplit> splits;
  for (const auto& [dim, v_dim] : {std::pair<int64_t, int64_t>{64, 64}, {128, 128}, {192, 128}}) {
    const std::pair<ArenaSplit, Case> some[] = {
        {ArenaSplit::kNeighbours, {"causal gqa", dim, v_dim, 900, 1100, 1, 4, 2, Mask::kCausal, 4}},
        {ArenaSplit::kZigzag, {"causal zigzag", dim, v_dim, 700, 1300, 1, 4, 1, Mask::kCausal, 8}},
        {ArenaSplit::kNeighbours, {"documents", dim, v_dim, 600, 600, 2, 4, 2, Mask::kDocuments, 4}},
        {ArenaSplit::kStriped, {"random striped", dim, v_dim, 500, 900, 2, 4, 1, Mask::kRandom, 5}},
    };
    for (const auto& [split, c] : some) {
      splits.push_back(split);
      cases.push_back(c);
    }
  }
  const std::vector<Prepared> prepared = PrepareAll<bf16>(cases, kArenaRealizations);
  bool ok = true;
  for (size_t i = 0; i < prepared.size(); ++i) {
    ok = CheckRepeats(prepared[i], splits[i], static_cast<uint32_t>(i)) && ok;
  }
  return ok;
}

}  // namespace

bool RunArena(const std::string& program) {
  const auto start = Clock::now();
  bool ok = CheckAll();
  const int missing = std::system((program + " arena_missing").c_str());
  if (missing != 0) std::printf("FAIL a missing part: status %d\n", missing);
  ok = ok && missing == 0;
  std::printf("arena checks %s in %.1f s\n", ok ? "passed" : "FAILED",
              std::chrono::duration<double>(Clock::now() - start).count());
  return TimeArena() && ok;
}

bool RunArenaMissing() {
  const Prepared prepared =
      Prepare<bf16>({"a part is missing", 128, 128, 300, 400, 1, 2, 1, Mask::kFull, 4}, 1);
  ArenaProblem problem(prepared, {.order = {3, 0, 1}, .never = 2, .patience_ms = 1000});
  DelayedCopies copies(1);
  return problem.CheckGivesUp(copies.Transport());
}

}  // namespace annulus::testing
