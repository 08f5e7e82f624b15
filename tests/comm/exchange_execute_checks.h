#pragma once

// Plans run by the host transport over a Communicator, with toy attention, and compared exactly; the same
// checks for every backend.

#include <thread>

#include "annulus/comm/exchange_build.h"
#include "comm/communicator_checks.h"
#include "comm/mixed_fields.h"
#include "comm/stalling_comm.h"
#include "comm/toy_rank.h"

namespace annulus::testing {

constexpr Pass kPasses[] = {Pass::kForward, Pass::kBackward};

// Every scheme for every divisor, and what else a choice can say.
inline std::vector<PlanChoice> ManyChoices(int ranks, int64_t heads) {
  std::vector<PlanChoice> choices = AllChoices(ranks, heads);
  choices.push_back({.kind = PlanKind::kKvRing, .direction = RingDirection::kTowardHigher, .parts = 2});
  choices.push_back({.kind = PlanKind::kTokenRing, .direction = RingDirection::kTowardLower, .buffers = 3});
  choices.push_back({.kind = PlanKind::kTokenRing, .parts = 2, .output_width = Width::kCompute});
  return choices;
}

// A random case cut as the choice wants it.
inline ExchangeCase CaseFor(const PlanChoice& choice, int ranks, uint64_t seed) {
  return ExchangeCaseMaker(seed).MakeRandom(ranks,
                                            {.parts = ChunkParts(choice), .heads = 4, .kv_heads = 2});
}

inline int64_t ToyBytesSent(const ExchangePlan& plan, int cp_rank) {
  const RankPlan& rank = plan.ranks[static_cast<size_t>(cp_rank)];
  int64_t bytes = 0;
  for (const Step& step : rank.steps) {
    if (step.kind != StepKind::kSend) continue;
    bytes += step.rows.rows.size() * ToyRowBytes(plan, rank.slots[static_cast<size_t>(step.slot)]);
  }
  return bytes;
}

inline absl::Status RunToy(Context& ctx, ExchangeTransport& transport, const ExchangePlan& plan,
                           ToyRank* rank, ExchangeStats* stats) {
  const ArenaScope scope(ctx.scratch);
  ExchangeBinding binding;
  ANNULUS_ASSIGN_OR_RETURN(binding.slots, transport.Slots(ctx, plan, rank->source()));
  rank->Bind(binding.slots);
  binding.compute = [&](const Step& step) {
    ctx.Poll();
    rank->Compute(step);
    ctx.Poll();
    return absl::OkStatus();
  };
  return transport.Execute(ctx, plan, binding, stats);
}

inline void ExecuteAndCompare(Communicator comm, ExchangeTransport& transport, const ExchangeCase& made,
                              const ExchangePlan& plan) {
  ASSERT_TRUE(AgreeOnPlan(plan, comm).ok());
  Context ctx{Device{}};
  int outer_polls = 0;
  ctx.progress = [&] { ++outer_polls; };
  ToyRank rank(made, plan, comm.rank());
  ExchangeStats stats;
  const absl::Status status = RunToy(ctx, transport, plan, &rank, &stats);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(rank.Compare(), "") << made.name << "\n" << ToString(plan);
  EXPECT_EQ(stats.bytes_sent, ToyBytesSent(plan, comm.rank()));
  EXPECT_GE(stats.exposed_seconds, 0);
  EXPECT_GT(outer_polls, 0);  // what was polled before goes on
  outer_polls = 0;
  ctx.Poll();
  EXPECT_EQ(outer_polls, 1);
}

// Every choice and pass, each on a random layout and mask, by one transport.
inline void ExecuteAll(Communicator comm, ExchangeTransport& transport, uint64_t seed) {
  for (const PlanChoice& choice : ManyChoices(comm.size(), 4)) {
    for (const Pass pass : kPasses) {
      const ExchangeCase made = CaseFor(choice, comm.size(), ++seed);
      const absl::StatusOr<ExchangePlan> plan = BuildPlan(made.problem, pass, choice);
      ASSERT_TRUE(plan.ok()) << plan.status();
      ExecuteAndCompare(comm, transport, made, *plan);
    }
  }
}

inline std::unique_ptr<ExchangeTransport> HostTransport(Communicator comm, LinkThrottle throttle = {}) {
  Context ctx{Device{}};
  return MakeTransport(TransportKind::kHost, std::move(comm), ctx, throttle).value();
}

inline void CheckExecute(Communicator comm) {
  const std::unique_ptr<ExchangeTransport> transport = HostTransport(comm);
  for (uint64_t seed = 0; seed < 3; ++seed) ExecuteAll(comm, *transport, 1000 * seed);
}

// Whatever is late: each message both in being posted and in being seen, and some for long.
inline void CheckDelays(Communicator comm) {
  ExecuteAll(comm, *HostTransport(WithRandomStalls(comm, /*seed=*/1)), 1);
  ExecuteAll(comm, *HostTransport(WithMessageDelay(comm, 200)), 2);
}

inline void CheckThrottledResults(Communicator comm) {
  ExecuteAll(comm, *HostTransport(comm, {.bytes_per_second = 20e6}), 3);
}

inline void CheckMixedFields(Communicator comm) { MixedFields(comm).Run(*HostTransport(comm)); }

// A step that fails on one rank: that rank reports it, all others finish.
inline void CheckFailingStep(Communicator comm, ExchangeTransport& transport) {
  const ExchangeCase made =
      ExchangeCaseMaker(3).Make(comm.size(), 4, 4 * comm.size(), CaseLayout::kContiguous, CaseMask::kFull);
  for (const PlanKind kind : {PlanKind::kKvRing, PlanKind::kTokenRing}) {
    const ExchangePlan plan = BuildPlan(made.problem, Pass::kBackward, {.kind = kind}).value();
    const std::vector<Step>& steps = plan.ranks[static_cast<size_t>(comm.rank())].steps;
    const auto computes = [](const Step& step) { return IsCompute(step.kind); };
    const auto first = std::find_if(steps.begin(), steps.end(), computes) - steps.begin();
    Context ctx{Device{}};
    ToyRank rank(made, plan, comm.rank());
    const bool fails = comm.rank() == comm.size() - 1;
    int64_t calls = 0;
    const ExchangeBinding binding{.slots = rank.slots(), .compute = [&](const Step&) {
                                    ++calls;
                                    return fails ? absl::InternalError("broken kernel") : absl::OkStatus();
                                  }};
    ExchangeStats stats;
    const absl::Status status = transport.Execute(ctx, plan, binding, &stats);
    EXPECT_EQ(status.ok(), !fails);
    EXPECT_EQ(calls, fails ? 1 : std::count_if(steps.begin(), steps.end(), computes));
    if (!fails) continue;
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
    const std::string where = absl::StrCat("rank ", comm.rank(), " step ", first, " (attend");
    EXPECT_NE(status.message().find(where), absl::string_view::npos) << status;
  }
}

inline void CheckFailingStepByHost(Communicator comm) { CheckFailingStep(comm, *HostTransport(comm)); }

inline void CheckAgreement(Communicator comm) {
  const ExchangeCase made =
      ExchangeCaseMaker(3).Make(comm.size(), 4, 4 * comm.size(), CaseLayout::kZigzag, CaseMask::kCausal);
  const ExchangePlan plan = BuildPlan(made.problem, Pass::kForward, {}).value();
  EXPECT_TRUE(AgreeOnPlan(plan, comm).ok());
  if (comm.size() == 1) return;
  for (int different = 0; different < comm.size(); ++different) {
    ExchangePlan mine = plan;
    if (comm.rank() == different) mine.ranks[0].steps[0].after.push_back(0);
    const absl::Status status = AgreeOnPlan(mine, comm);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_NE(status.message().find("expected the same plan"), absl::string_view::npos) << status;
  }
}

// ---- Time of throttled links ----------------------------------------------------------------------------

inline double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds of the slowest rank, which all begin at one time.
inline double TimedRun(Communicator comm, const std::function<void()>& fn) {
  // Ranks leave a barrier one after the other where they outnumber cores.
  const double start = comm.AllReduceValue(Now(), ReduceOp::kMax).value() + 2e-3;
  std::this_thread::sleep_for(std::chrono::duration<double>(start - Now()));
  fn();
  return comm.AllReduceValue(Now() - start, ReduceOp::kMax).value();
}

// Each link moves a block in kBlockSeconds. One link after the other in a ring, halves on two links in a
// bidirectional one (between two ranks both are the same link), all links at once in an all-gather: no more
// time than that, but for what the host takes, and never less.
inline void CheckThrottledTimes(Communicator comm) {
  ASSERT_GE(comm.size(), 2);
  constexpr double kBlockSeconds = 20e-3, kMargin = 1.25, kLimitSeconds = 20;
  const int hops = comm.size() - 1;
  const std::pair<PlanKind, double> kinds[] = {{PlanKind::kKvRing, hops},
                                               {PlanKind::kBidirectionalKvRing, hops == 1 ? 1 : hops / 2.0},
                                               {PlanKind::kAllGather, 1}};
  for (const auto& [kind, blocks] : kinds) {
    const PlanChoice choice{.kind = kind};
    const CaseCut cut{.parts = ChunkParts(choice), .heads = 8, .kv_heads = 8};
    const ExchangeCase made = ExchangeCaseMaker(1).Make(comm.size(), 4, 4 * comm.size(),
                                                        CaseLayout::kContiguous, CaseMask::kFull, cut);
    const ExchangePlan plan = BuildPlan(made.problem, Pass::kForward, choice).value();
    const int64_t block_bytes = 4 * ToyRowBytes(plan, {});
    const std::unique_ptr<ExchangeTransport> transport =
        HostTransport(comm, {.bytes_per_second = static_cast<double>(block_bytes) / kBlockSeconds});
    const double expected = blocks * kBlockSeconds, begin = Now();
    // Other load only adds to the time: the shortest of several runs counts.
    double best = 1e9;
    for (int i = 0; i < 3 || best > kMargin * expected; ++i) {
      if (comm.AllReduceValue(Now() - begin, ReduceOp::kMax).value() > kLimitSeconds) break;
      Context ctx{Device{}};
      ToyRank rank(made, plan, comm.rank());
      ExchangeStats stats;
      best = std::min(
          best, TimedRun(comm, [&] { EXPECT_TRUE(RunToy(ctx, *transport, plan, &rank, &stats).ok()); }));
      EXPECT_EQ(rank.Compare(), "");
    }
    EXPECT_GE(best, expected) << plan.name;
    EXPECT_LE(best, kMargin * expected) << plan.name;
  }
}

}  // namespace annulus::testing
