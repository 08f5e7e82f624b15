#include "annulus/parallel/choose_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <tuple>

#include "absl/strings/match.h"
#include "annulus/base/check.h"

namespace annulus {
namespace {

constexpr Pass kPasses[] = {Pass::kForward, Pass::kBackward};

struct Heads {
  int64_t query, kv;
};
constexpr Heads kMha{16, 16}, kGqa{32, 8};

AttentionCase CausalCase(int ranks, int64_t length, Heads heads) {
  return {.layout = SequenceLayout(LayoutKind::kZigzag, length, ranks),
          .sequences = {.batch = 1, .lengths = {length}, .document_starts = {}},
          .heads = heads.query,
          .kv_heads = heads.kv,
          .head_dim = 128,
          .v_head_dim = 128,
          .device = DeviceKind::kCuda,
          .dtype = DType::kBF16};
}

PlanOptions By(TransportKind transport) {
  return {.plans = {}, .transports = {transport}, .throttle = {}, .buffer_bytes = 0};
}

// Computing takes what its FLOPs take, wherever it is; passes over memory take nothing. So what differs
// between plans is what they move, at one rate whatever the size.
MachineProfile EvenMachine(double flops, double link_bytes_per_second) {
  MachineProfile machine{.device = "even",
                         .measured = false,
                         .ranks = 2,
                         .attention = {},
                         .links = {},
                         .copy = {{1, 1e30}},
                         .launch_seconds = 0};
  for (const Pass pass : kPasses) {
    const double per_pair = pass == Pass::kForward ? 512 : 1280;
    machine.attention.push_back({.kernel = AttentionKernel::kCudnn,
                                 .pass = pass,
                                 .shape = MaskShape::kFull,
                                 .head_dim = 128,
                                 .v_head_dim = 128,
                                 .pairs = {{1, flops / per_pair}}});
  }
  const std::vector<RatePoint> rate = {{1, link_bytes_per_second}};
  machine.links.push_back({TransportKind::kHost, rate, rate, 0, 1});
  return machine;
}

ExchangePlan PlanFor(const AttentionCase& layer, Pass pass, const PlanChoice& choice) {
  absl::StatusOr<ExchangePlan> plan =
      BuildPlan(MakeExchangeProblem(layer.layout, layer.sequences, layer.window, layer.heads, layer.kv_heads,
                                    ChunkParts(choice)),
                pass, choice);
  ANNULUS_CHECK(plan.ok()) << plan.status();
  return *std::move(plan);
}

const PlanCandidate& Find(const std::vector<PlanCandidate>& ranked, PlanKind kind, int head_split = 1) {
  const auto found = std::find_if(ranked.begin(), ranked.end(), [&](const PlanCandidate& candidate) {
    return candidate.choice.kind == kind && candidate.choice.head_split == head_split;
  });
  ANNULUS_CHECK(found != ranked.end()) << Name(kind);
  return *found;
}
const PlanCandidate& Ulysses(const std::vector<PlanCandidate>& ranked, int ranks) {
  return Find(ranked, PlanKind::kKvRing, ranks);
}

// ---- Costs --------------------------------------------------------------------------------------

// A causal sequence of 1024 tokens on one rank: one call with 1024 * 1025 / 2 pairs of 16 heads, in f32,
// whose kernel is priced by pairs.
TEST(CostOf, OneRankTakesWhatItsCallTakes) {
  AttentionCase layer = CausalCase(1, 1024, kMha);
  layer.dtype = DType::kF32;
  const MachineProfile machine = EvenMachine(1e12, 1);
  for (const Pass pass : kPasses) {
    const ExchangePlan plan = PlanFor(layer, pass, {});
    const Simulation run = Simulate(plan, CostOf(layer, plan, machine, TransportKind::kHost, {}));
    const double flops = 1024.0 * 1025 / 2 * 16 * (pass == Pass::kForward ? 512 : 1280);
    EXPECT_NEAR(run.makespan, flops / 1e12, 1e-9 * run.makespan);
    EXPECT_EQ(run.bytes_sent[0], 0);
  }
}

// By hand, for 4 ranks of n tokens (exchange.md): all of a rank's queries, keys, values and outputs but the
// part that stays; and three quarters of KV round the zigzag ring.
TEST(CostOf, BytesAreThoseOfTheFormulas) {
  const int64_t ranks = 4, n = 2048, d = 128;
  const AttentionCase layer = CausalCase(4, ranks * n, kMha);
  const MachineProfile machine = EvenMachine(1e12, 1e9);
  const auto sent = [&](Pass pass, const PlanChoice& choice) {
    const ExchangePlan plan = PlanFor(layer, pass, choice);
    const Simulation run = Simulate(plan, CostOf(layer, plan, machine, TransportKind::kHost, {}));
    int64_t bytes = 0;
    for (const int64_t of_rank : run.bytes_sent) bytes += of_rank;
    return bytes;
  };
  const int64_t kv = n * 2 * 16 * d * 2, q = n * 16 * d * 2, lse = n * 16 * 4;
  EXPECT_EQ(sent(Pass::kForward, {.kind = PlanKind::kKvRing}), ranks * (ranks - 1) * kv * 3 / 4);
  // Outputs return in f32 with their LSE, from places that queries came to.
  EXPECT_EQ(sent(Pass::kForward, {.kind = PlanKind::kTokenRing}),
            ranks * (ranks - 1) * (q + 2 * q + lse) * 3 / 4);
  const int64_t ulysses = sent(Pass::kForward, {.head_split = 4});
  const int64_t least = (ranks - 1) * (q + kv + q + lse);
  EXPECT_GE(ulysses, least);
  EXPECT_LE(ulysses, (ranks - 1) * (q + kv + 2 * q + lse));  // outputs in either width
}

// Two ranks with all KV to gather and next to nothing to compute: messages of 16 MiB take what was measured.
TEST(CostOf, MessagesTakeWhatWasMeasured) {
  const AttentionCase layer = CausalCase(2, 2 * 4096, kGqa);  // KV of 4096 * 2 * 8 * 128 * 2 bytes = 16 MiB
  MachineProfile machine = EvenMachine(1e24, 1);
  constexpr double kMiB = 1 << 20;
  machine.links[0].one_way = {{kMiB, 75e9}, {16 * kMiB, 301e9}, {128 * kMiB, 377e9}};
  machine.links[0].both_ways = machine.links[0].one_way;
  machine.links[0].message_seconds = 1e-6;  // less than the overhead between messages
  const ExchangePlan plan = PlanFor(layer, Pass::kForward, {.kind = PlanKind::kAllGather});
  const auto seconds = [&](LinkThrottle throttle) {
    return Simulate(plan, CostOf(layer, plan, machine, TransportKind::kHost, throttle)).makespan;
  };
  EXPECT_NEAR(seconds({}), 16 * kMiB / 301e9, 0.01 * 16 * kMiB / 301e9);
  // The throttle holds the link for bytes / rate in all, the overhead included.
  EXPECT_NEAR(seconds({20e9}), 16 * kMiB / 20e9, 0.01 * 16 * kMiB / 20e9);
}

// What the library's kernels add up in passes of their own, and several calls, cost more than one call.
TEST(CostOf, CarryingResultsCostsPasses) {
  const AttentionCase layer = CausalCase(4, 1 << 15, kMha);
  MachineProfile machine = EvenMachine(600e12, 1e15);
  const ExchangePlan plan = PlanFor(layer, Pass::kBackward, {.kind = PlanKind::kKvRing});
  const auto seconds = [&] {
    return Simulate(plan, CostOf(layer, plan, machine, TransportKind::kHost, {})).makespan;
  };
  const double alone = seconds();
  machine.copy = {{1, 3e12}};
  const double with_passes = seconds();
  EXPECT_GT(with_passes, alone + 4 * 2 * 8192 * 16 * 128 * 4 / 3e12 / 4);
  machine.launch_seconds = 1e-3;
  EXPECT_GT(seconds(), with_passes + 4 * 1e-3);
}

// ---- Choices ------------------------------------------------------------------------------------

// n >= 2 F / (g B): computing on a block takes longer than the next one needs to come.
TEST(RankPlans, RingsHideKvOfGroupedQueriesAtLongLengths) {
  // g = 4, F = 500e12, B = 100e9: from 2500 tokens a rank.
  const MachineProfile machine = EvenMachine(500e12, 100e9);
  for (const Pass pass : kPasses) {
    const auto ranked = RankPlans(CausalCase(4, 4 * 16384, kGqa), pass, By(TransportKind::kHost), machine);
    const PlanCandidate& ring = Find(ranked, PlanKind::kKvRing);
    EXPECT_LT(ring.exposed_seconds, 0.1 * ring.seconds);
    EXPECT_LT(ring.seconds, Ulysses(ranked, 4).seconds);
    EXPECT_LE(ring.seconds, Find(ranked, PlanKind::kTokenRing).seconds * (1 + 1e-9));
    // The winner moves KV, not queries.
    EXPECT_EQ(ranked[0].choice.head_split, 1) << WhyItWon(ranked);
    EXPECT_LT(ranked[0].exposed_seconds, 0.1 * ranked[0].seconds) << WhyItWon(ranked);
  }
}

// Hq + max(Hkv, P) < P Hkv: the all-to-all moves least where links are slow and KV has many heads; with KV
// of few heads it does not.
TEST(RankPlans, UlyssesWinsWhereItMovesLess) {
  const MachineProfile slow = EvenMachine(500e12, 1e9);
  for (const Pass pass : kPasses) {
    const auto mha = RankPlans(CausalCase(8, 1 << 15, kMha), pass, By(TransportKind::kHost), slow);
    EXPECT_EQ(mha[0].choice.head_split, 8) << WhyItWon(mha);
    EXPECT_LT(2 * mha[0].seconds, Find(mha, PlanKind::kKvRing).seconds);
  }
  const auto mqa = RankPlans(CausalCase(4, 1 << 15, {32, 1}), Pass::kForward, By(TransportKind::kHost), slow);
  EXPECT_LT(Find(mqa, PlanKind::kKvRing).seconds, Ulysses(mqa, 4).seconds);
}

// P = 16, more ranks than heads: groups of ranks share out the heads and exchange KV between them.
TEST(RankPlans, TwoDimensionsWinAmongManyRanksOnSlowLinks) {
  const auto ranked = RankPlans(CausalCase(16, 1 << 16, {8, 8}), Pass::kForward, By(TransportKind::kHost),
                                EvenMachine(500e12, 1e9));
  EXPECT_TRUE(ranked[0].choice.head_split > 1 || ranked[0].choice.kind == PlanKind::kMesh)
      << WhyItWon(ranked);
  EXPECT_LT(1.5 * ranked[0].seconds, Find(ranked, PlanKind::kKvRing).seconds);
}

// Links side by side: rings that go both ways round beat those that go one way.
TEST(RankPlans, BothWaysWinOnThrottledLinks) {
  const AttentionCase layer = CausalCase(4, 1 << 15, kMha);
  PlanOptions options = By(TransportKind::kCopyEngine);
  options.throttle = {10e9};
  for (const Pass pass : kPasses) {
    const auto ranked = RankPlans(layer, pass, options, AssumedHopper());
    EXPECT_GE(Find(ranked, PlanKind::kKvRing).seconds,
              1.5 * Find(ranked, PlanKind::kBidirectionalKvRing).seconds);
  }
  // Through one egress they have nothing to win.
  const auto shared = RankPlans(layer, Pass::kForward, By(TransportKind::kHost), EvenMachine(500e12, 10e9));
  EXPECT_LT(Find(shared, PlanKind::kKvRing).seconds,
            1.05 * Find(shared, PlanKind::kBidirectionalKvRing).seconds);
}

// 8K tokens on each of 4 GPUs with copy engines: under 3% of the layer's time.
TEST(RankPlans, LittleIsExposedWithNvlink) {
  for (const Pass pass : kPasses) {
    const auto ranked =
        RankPlans(CausalCase(4, 1 << 15, kGqa), pass, By(TransportKind::kCopyEngine), AssumedHopper());
    const PlanCandidate& ring = Find(ranked, PlanKind::kKvRing);
    EXPECT_LT(ring.exposed_seconds, 0.03 * ring.seconds);
  }
}

double FastestOf(const std::vector<PlanCandidate>& ranked) {
  double fastest = 1e30;
  for (const PlanCandidate& each : ranked) {
    if (each.refused.ok()) fastest = std::min(fastest, each.seconds);
  }
  return fastest;
}

TEST(RankPlans, FasterLinksAreNeverSlower) {
  for (const Pass pass : kPasses) {
    double before = 1e30;
    for (const double rate : {1e9, 4e9, 16e9, 64e9, 256e9, 1e12}) {
      const auto ranked =
          RankPlans(CausalCase(4, 1 << 14, kGqa), pass, By(TransportKind::kHost), EvenMachine(500e12, rate));
      EXPECT_LE(FastestOf(ranked), before * (1 + 1e-9)) << rate;
      before = FastestOf(ranked);
    }
  }
}

// Between plans about as fast, waiting and bytes decide; a plan that is faster by more wins whatever it
// sends.
TEST(RankPlans, WaitsAndSendsLittleWhereThatIsAboutAsFast) {
  for (const Pass pass : kPasses) {
    for (const double rate : {1e9, 10e9, 100e9, 1e12}) {
      const auto ranked =
          RankPlans(CausalCase(4, 1 << 15, kMha), pass, By(TransportKind::kHost), EvenMachine(500e12, rate));
      const double fastest = FastestOf(ranked);
      const PlanCandidate& won = ranked[0];
      EXPECT_LE(won.seconds, 1.02 * fastest);
      for (const PlanCandidate& each : ranked) {
        if (!each.refused.ok() || each.seconds > 1.02 * fastest) continue;
        EXPECT_LE(won.exposed_seconds, each.exposed_seconds + 0.0011 * fastest) << each.name;
        if (each.exposed_seconds != won.exposed_seconds) continue;
        EXPECT_LE(won.bytes_sent, each.bytes_sent) << each.name;
      }
    }
  }
}

TEST(RankPlans, PrefersCopyEnginesToNcclOfTheSameSpeed) {
  MachineProfile machine = EvenMachine(500e12, 1e12);
  LinkRate nccl = machine.links.front(), copies = nccl;
  nccl.transport = TransportKind::kNccl, copies.transport = TransportKind::kCopyEngine;
  copies.computing_slowdown = 1.015;
  machine.links = {nccl, copies};
  PlanOptions options = By(TransportKind::kNccl);
  options.transports = {TransportKind::kNccl, TransportKind::kCopyEngine};
  options.plans = {{.kind = PlanKind::kAllGather}};
  const auto ranked = RankPlans(CausalCase(4, 1 << 15, kGqa), Pass::kForward, options, machine);
  EXPECT_EQ(ranked[0].transport, TransportKind::kCopyEngine) << WhyItWon(ranked);
}

TEST(RankPlans, KeepsToTheBufferBudget) {
  const AttentionCase layer = CausalCase(8, 1 << 15, kGqa);
  PlanOptions options = By(TransportKind::kHost);
  const MachineProfile machine = EvenMachine(500e12, 1e9);
  const auto free = RankPlans(layer, Pass::kForward, options, machine);
  const PlanCandidate& ring = Find(free, PlanKind::kKvRing);
  // Two blocks of KV, however many ranks.
  EXPECT_EQ(ring.buffer_bytes, 2 * 4096 * 2 * 8 * 128 * 2);
  EXPECT_EQ(Find(free, PlanKind::kAllGather).buffer_bytes, 7 * ring.buffer_bytes / 2);
  ASSERT_GT(free[0].buffer_bytes, ring.buffer_bytes);  // else the budget refuses nothing that matters
  options.buffer_bytes = ring.buffer_bytes;
  const auto bound = RankPlans(layer, Pass::kForward, options, machine);
  ASSERT_EQ(bound.size(), free.size());
  EXPECT_TRUE(bound[0].refused.ok());
  bool refused = false;
  for (const PlanCandidate& candidate : bound) {
    EXPECT_EQ(candidate.refused.ok(), candidate.buffer_bytes <= options.buffer_bytes) << candidate.name;
    EXPECT_TRUE(!refused || !candidate.refused.ok()) << "the refused come last";
    refused = refused || !candidate.refused.ok();
  }
  const PlanCandidate& all_gather = Find(bound, PlanKind::kAllGather);
  EXPECT_EQ(all_gather.refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(all_gather.refused.message(),
            "all_gather: buffers of 112.0 MiB on a rank: expected at most 32.0 MiB");
}

TEST(RankPlans, RefusesWithTheReason) {
  PlanOptions options = By(TransportKind::kHost);
  options.plans = {{.head_split = 3}, {.kind = PlanKind::kTokenRing}};
  options.transports = {TransportKind::kHost, TransportKind::kNccl};
  const auto ranked =
      RankPlans(CausalCase(4, 4096, kGqa), Pass::kForward, options, EvenMachine(500e12, 10e9));
  ASSERT_EQ(ranked.size(), 3u);
  EXPECT_EQ(ranked[0].choice.kind, PlanKind::kTokenRing);
  EXPECT_EQ(ranked[1].refused.message().substr(0, 32), "head_split=3: expected a divisor")
      << ranked[1].refused;
  const std::string reason = "machine profile of even: no rates of messages by nccl",
                    cure = ": expected a profile that launch/mpirun -n 2 annulus calibrate wrote";
  EXPECT_EQ(ranked[2].refused.message(), reason + cure);
  MachineProfile alone = EvenMachine(500e12, 10e9);
  alone.measured = true, alone.ranks = 1;
  EXPECT_EQ(RankPlans(CausalCase(4, 4096, kGqa), Pass::kForward, options, alone)[2].refused.message(),
            reason + ", as it was measured with 1 rank" + cure);
  options.plans = {{.head_split = 3}};
  EXPECT_EQ(WhyItWon(RankPlans(CausalCase(4, 4096, kGqa), Pass::kForward, options, EvenMachine(1, 1))),
            "no plan can be");
}

TEST(RankPlans, SaysWhy) {
  const auto ranked = RankPlans(CausalCase(8, 1 << 15, kMha), Pass::kForward, By(TransportKind::kHost),
                                EvenMachine(500e12, 1e9));
  const std::string why = WhyItWon(ranked);
  EXPECT_EQ(why.substr(0, 16), "ulysses by host ") << why;
  EXPECT_NE(why.find("; next "), std::string::npos) << why;
  EXPECT_NE(why.find(", which exposes "), std::string::npos) << why;
  EXPECT_EQ(why.find('\n'), std::string::npos) << why;
}

// Only what is so.
TEST(RankPlans, SaysWhatTellsEqualsApart) {
  PlanCandidate won;
  won.choice.kind = PlanKind::kKvRing, won.name = "kv_ring";
  won.seconds = 1, won.buffer_bytes = 10, won.bytes_sent = 10;
  PlanCandidate other = won;
  other.choice.kind = PlanKind::kMesh, other.name = "mesh";
  const auto ends_with = [&](absl::string_view end) {
    const std::string why = WhyItWon({won, other});
    EXPECT_TRUE(absl::EndsWith(why, end)) << why;
  };
  ends_with(", which is as good");
  other.exposed_seconds = 0.3;
  ends_with(", which exposes 300 ms more");
  other.exposed_seconds = 0, other.bytes_sent = 11;
  ends_with(", which sends more");
  other.buffer_bytes = 11;
  ends_with(", which needs more memory");
  other.seconds = 2;
  ends_with(", which computes 1e+03 ms longer");
  other.seconds = 0.99;
  ends_with(", which is about as fast but sends more");
  other.exposed_seconds = 0.5;
  ends_with(", which is about as fast but exposes 500 ms more");
  other.simulated = false;
  ends_with(": others take about as long or longer");
  other.refused = absl::ResourceExhaustedError("no");
  ends_with(": no other kind can be");
  const std::string alone = WhyItWon({won});
  EXPECT_TRUE(absl::EndsWith(alone, ": the only kind that may be")) << alone;
}

// What a budget leaves is said in a unit that shows it.
TEST(RankPlans, NamesSmallBudgets) {
  PlanOptions options = By(TransportKind::kHost);
  options.plans = {{.kind = PlanKind::kAllGather}};
  options.buffer_bytes = 9;
  const auto ranked = RankPlans(CausalCase(4, 64, kMha), Pass::kForward, options, EvenMachine(1e12, 1e9));
  EXPECT_TRUE(absl::EndsWith(ranked[0].refused.message(), " KiB on a rank: expected at most 9 bytes"))
      << ranked[0].refused;
}

// ---- Many ranks ---------------------------------------------------------------------------------

constexpr int kManyRanks = 36;
static_assert(kManyRanks > kSimulateAllRanks);

TEST(RankPlans, FindsTheFastestAmongManyRanksWithoutSimulatingAll) {
  const AttentionCase layer = CausalCase(kManyRanks, kManyRanks * 2048, kGqa);
  for (const Pass pass : kPasses) {
    PlanOptions options = By(TransportKind::kCopyEngine);
    if (pass == Pass::kBackward) options.throttle = {5e9};
    const auto ranked = RankPlans(layer, pass, options, AssumedHopper());
    EXPECT_EQ(ranked.size(), AllChoices(kManyRanks, layer.heads).size());
    EXPECT_TRUE(ranked.front().simulated);
    EXPECT_FALSE(ranked.back().simulated);
    for (const PlanCandidate& candidate : ranked) {
      // Of a list of one everything is simulated.
      options.plans = {candidate.choice};
      const PlanCandidate alone = RankPlans(layer, pass, options, AssumedHopper()).front();
      ASSERT_TRUE(alone.refused.ok() && alone.simulated) << alone.name;
      EXPECT_LE(ranked[0].seconds, 1.02 * alone.seconds) << alone.name << ", " << WhyItWon(ranked);
      if (candidate.simulated) {
        EXPECT_EQ(candidate.seconds, alone.seconds) << alone.name;
      } else {
        EXPECT_LE(candidate.seconds, alone.seconds * (1 + 1e-9)) << alone.name << ": a bound is one";
      }
      EXPECT_EQ(candidate.bytes_sent, alone.bytes_sent) << alone.name;
    }
  }
}

bool InParts(const PlanCandidate& candidate) { return candidate.choice.parts > 1; }

// Few ranks over slow links wait for their first block: in parts it is there earlier.
TEST(RankPlans, ChoosesPartsOverSlowLinks) {
  const AttentionCase layer = CausalCase(2, 8192, kGqa);
  PlanOptions options = By(TransportKind::kCopyEngine);
  options.throttle = {5e9};
  for (const Pass pass : kPasses) {
    const PlanCandidate whole = RankPlans(layer, pass, options, AssumedHopper()).front();
    PlanOptions in_parts = options;
    in_parts.parts = {2, 4};
    const auto ranked = RankPlans(layer, pass, in_parts, AssumedHopper());
    EXPECT_EQ(ranked[0].choice.parts, 4) << WhyItWon(ranked);
    EXPECT_LT(ranked[0].seconds, 0.98 * whole.seconds) << WhyItWon(ranked);
    EXPECT_TRUE(ranked[0].simulated);
    // What was found is what that choice takes by itself.
    options.plans = {ranked[0].choice};
    EXPECT_EQ(RankPlans(layer, pass, options, AssumedHopper()).front().seconds, ranked[0].seconds);
    options.plans = {};
  }
}

// For any number of ranks where blocks are waited for, and nowhere else.
TEST(RankPlans, TriesPartsWhereTheyCanWin) {
  for (const int ranks : {2, 4, 8, kManyRanks}) {
    PlanOptions options = By(TransportKind::kCopyEngine);
    options.parts = {2, 4};
    const AttentionCase layer = CausalCase(ranks, ranks * 4096, kGqa);
    options.throttle = {1e9};
    const auto slow = RankPlans(layer, Pass::kForward, options, AssumedHopper());
    EXPECT_TRUE(std::any_of(slow.begin(), slow.end(), InParts)) << ranks;
    PlanOptions by_host = By(TransportKind::kHost);
    by_host.parts = options.parts;
    const auto fast = RankPlans(layer, Pass::kForward, by_host, EvenMachine(1e12, 1e15));
    EXPECT_FALSE(std::any_of(fast.begin(), fast.end(), InParts)) << ranks << ": nothing is waited for";
  }
}

// Masks of documents, padding and several sequences; ordered sums; the CPU.
TEST(RankPlans, PricesEveryMaskAndDevice) {
  const int64_t length = 1000;
  for (const int ranks : {1, 3, 4}) {
    AttentionCase layer = CausalCase(ranks, length, kGqa);
    layer.sequences = {.batch = 2, .lengths = {length, 700}, .document_starts = {}};
    for (int item = 0; item < 2; ++item) {
      auto& starts = layer.sequences.document_starts.emplace_back();
      for (int64_t p = 0; p < length; ++p) starts.push_back(p / (90 + item) * (90 + item));
    }
    for (const Determinism determinism : {Determinism::kOff, Determinism::kRequired}) {
      layer.determinism = determinism;
      for (const Pass pass : kPasses) {
        for (const auto& [device, dtype, transport, machine] :
             {std::tuple(DeviceKind::kCuda, DType::kBF16, TransportKind::kCopyEngine, AssumedHopper()),
              std::tuple(DeviceKind::kCpu, DType::kF64, TransportKind::kHost, AssumedCpuCore())}) {
          layer.device = device, layer.dtype = dtype;
          for (const PlanCandidate& candidate : RankPlans(layer, pass, By(transport), machine)) {
            EXPECT_TRUE(candidate.refused.ok()) << candidate.refused;
            EXPECT_GT(candidate.seconds, 0) << candidate.name;
          }
        }
      }
    }
  }
}

TEST(RankPlans, IsTheSameEveryTime) {
  const AttentionCase layer = CausalCase(8, 1 << 14, kGqa);
  for (const Pass pass : kPasses) {
    const auto ranked = RankPlans(layer, pass, By(TransportKind::kNccl), AssumedHopper());
    const auto again = RankPlans(layer, pass, By(TransportKind::kNccl), AssumedHopper());
    ASSERT_EQ(ranked.size(), again.size());
    for (size_t i = 0; i < ranked.size(); ++i) {
      EXPECT_EQ(ranked[i].choice, again[i].choice);
      EXPECT_EQ(ranked[i].seconds, again[i].seconds);
      EXPECT_EQ(ranked[i].exposed_seconds, again[i].exposed_seconds);
    }
  }
}

// Of both passes, with everything that AUTO tries.
double SecondsToRank(int ranks, int64_t length) {
  PlanOptions options = By(TransportKind::kCopyEngine);
  options.transports.push_back(TransportKind::kNccl);
  options.parts = {2, 4};
  const auto begin = std::chrono::steady_clock::now();
  for (const Pass pass : kPasses) RankPlans(CausalCase(ranks, length, kGqa), pass, options, AssumedHopper());
  const double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  testing::Test::RecordProperty("ms", static_cast<int>(took * 1000));
  return took;
}

// 4 s and 0.1 s; more for sanitizers and busy machines.
TEST(RankPlans, IsQuickAmongManyRanks) { EXPECT_LT(SecondsToRank(64, 1 << 18), 40); }
TEST(RankPlans, IsQuick) { EXPECT_LT(SecondsToRank(8, 1 << 17), 3); }

}  // namespace
}  // namespace annulus
