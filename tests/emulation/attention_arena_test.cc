// The Hopper forward over an arena under emulation, against the naive double reference. Chunks arrive between
// two looks at flags.

#include "cuda/attention_hopper/arena_check.h"
#include "emulation/emulated_case.h"

namespace annulus::testing {
namespace {

// One arrival about every `looks` looks at a flag.
ArenaTransport ByLooks(uint32_t looks) {
  const auto start = [looks](const std::vector<ArenaArrival>& arrivals) {
    emulation::g_raise_flags = [arrivals, looks, next = size_t{0}]() mutable {
      if (next == arrivals.size() || emulation::Random(looks) != 0) return;
      const ArenaArrival& arrival = arrivals[next++];
      for (const ArenaCopy& copy : arrival.copies) std::memcpy(copy.to, copy.from, copy.bytes);
      *arrival.flag = arrival.value;
    };
  };
  return {start, [] { emulation::g_raise_flags = nullptr; }};
}

class EmulatedArena : public EmulatedCase {
 protected:
  Prepared Solve(Case c) {
    c.dim = GetParam().dim;
    c.v_dim = GetParam().v_dim;
    return Prepare<bf16>(c, 1, kArenaRealizations);
  }
  // Some arrivals close to each other, others far apart.
  void Check(const Prepared& prepared, const ArenaPlan& plan, uint32_t seed) {
    emulation::SetSeed(seed);
    constexpr uint32_t kLooks[] = {1, 5, 25};
    EXPECT_TRUE(ArenaProblem(prepared, plan).Check(ByLooks(kLooks[seed % 3]))) << "seed " << seed;
  }
  // Every order in which four parts can arrive, or the last three with the first there from the start.
  void CheckOrders(const Case& c, ArenaSplit split, int there) {
    const Prepared prepared = Solve(c);
    ArenaPlan plan{.split = split};
    for (int part = there; part < c.chunks; ++part) plan.order.push_back(part);
    uint32_t seed = 0;
    do {
      plan.rounded = seed % 4 != 0;
      Check(prepared, plan, seed++);
    } while (std::next_permutation(plan.order.begin(), plan.order.end()));
  }
};

// name, dim, v_dim, q_rows, k_rows, batch, heads, kv_heads, mask, chunks
TEST_P(EmulatedArena, Causal) {
  CheckOrders({"causal gqa", 0, 0, 150, 300, 1, 2, 1, Mask::kCausal, 4}, ArenaSplit::kNeighbours,
              GetParam().dim == 64 ? 0 : 1);
}
TEST_P(EmulatedArena, Zigzag) {
  CheckOrders({"causal zigzag gqa", 0, 0, 200, 390, 1, 2, 1, Mask::kCausal, 4}, ArenaSplit::kZigzag, 1);
}
TEST_P(EmulatedArena, Documents) {
  CheckOrders({"documents", 0, 0, 260, 260, 2, 2, 2, Mask::kDocuments, 4}, ArenaSplit::kNeighbours, 1);
}
TEST_P(EmulatedArena, Striped) {
  CheckOrders({"random striped", 0, 0, 200, 300, 1, 3, 1, Mask::kRandom, 4}, ArenaSplit::kStriped, 1);
}
TEST_P(EmulatedArena, AllThere) {
  const Prepared prepared = Solve({"all there", 0, 0, 140, 333, 2, 2, 1, Mask::kCausal, 5});
  Check(prepared, {}, 1);
  Check(prepared, {.split = ArenaSplit::kZigzag, .rounded = false}, 2);
}
TEST_P(EmulatedArena, MoreBlocksThanTiles) {
  emulation::SetMultiprocessors(3);
  const Prepared prepared = Solve({"one tile", 0, 0, 60, 330, 1, 1, 1, Mask::kFull, 6});
  for (uint32_t seed = 0; seed < 3; ++seed) Check(prepared, {.order = {5, 1, 4, 2, 3, 0}}, seed);
  emulation::SetMultiprocessors(2);
}
TEST_P(EmulatedArena, RowsWithoutKeys) {
  const Prepared prepared = Solve({"early queries", 0, 0, 250, 100, 1, 2, 1, Mask::kCausal, 3});
  for (uint32_t seed = 0; seed < 3; ++seed) {
    Check(prepared, {.order = {2, 0, 1}, .rounded = seed % 2 == 0}, seed);
  }
}
TEST_P(EmulatedArena, NoKeys) {
  Check(Solve({"no rows", 0, 0, 70, 0, 1, 2, 1, Mask::kFull, 1}), {.order = {0}}, 0);
  Check(Solve({"no chunks", 0, 0, 70, 0, 1, 2, 1, Mask::kFull, 0}), {.rounded = false}, 0);
}
// Nobody sees the last part: it is NaN, and nobody waits for it.
TEST_P(EmulatedArena, HiddenPartsAreNotAwaited) {
  const Prepared prepared = Solve({"start", 0, 0, 70, 400, 1, 2, 1, Mask::kStart, 4});
  Check(prepared, {.order = {1, 0}, .never = 3}, 1);
}

TEST_P(EmulatedArena, MissingPartIsReported) {
  const Prepared prepared = Solve({"missing", 0, 0, 70, 100, 1, 2, 1, Mask::kFull, 4});
  for (uint32_t seed = 0; seed < 3; ++seed) {
    emulation::SetSeed(seed);
    ArenaProblem problem(prepared, {.order = {3, 0, 1}, .never = 2, .patience_ms = 2});
    EXPECT_TRUE(problem.CheckGivesUp(ByLooks(20)));
  }
}

TEST(EmulatedArenaArguments, AreChecked) {
  alignas(16) char memory[16];
  auto* const at = reinterpret_cast<bf16*>(memory);
  const auto try_chunks = [&](const std::vector<kernels::HopperArenaChunk>& chunks) {
    const kernels::HopperAttentionArena arena{.block = {.q = {at, 64, 64},
                                                        .k = {at, 64, 64},
                                                        .v = {at, 64, 64},
                                                        .q_rows = 0,
                                                        .k_rows = 100,
                                                        .batch = 1,
                                                        .heads = 1,
                                                        .kv_heads = 1,
                                                        .dim = 64,
                                                        .v_dim = 64},
                                              .chunks = chunks};
    return kernels::HopperAttentionForwardArena(
        arena, {{reinterpret_cast<float*>(memory), 64, 64}, reinterpret_cast<float*>(memory), {}}, memory,
        nullptr);
  };
  EXPECT_EQ(try_chunks({{.first_row = 60, .rows = 40}}), cudaSuccess);
  EXPECT_EQ(try_chunks({{.first_row = 61, .rows = 40}}), cudaErrorInvalidValue);
  EXPECT_EQ(try_chunks({{.first_row = -1, .rows = 40}}), cudaErrorInvalidValue);
  EXPECT_EQ(try_chunks({{.rows = 40, .key_stride = 0}}), cudaErrorInvalidValue);
  EXPECT_EQ(try_chunks(std::vector<kernels::HopperArenaChunk>(64)), cudaSuccess);
  EXPECT_EQ(try_chunks(std::vector<kernels::HopperArenaChunk>(65)), cudaErrorInvalidValue);
}

INSTANTIATE_TEST_SUITE_P(Heads, EmulatedArena, AllHeadDims(), NameOf);

}  // namespace
}  // namespace annulus::testing
