#include "annulus/comm/exchange_simulate.h"

#include <gtest/gtest.h>

#include "annulus/base/check.h"
#include "annulus/comm/exchange_build.h"
#include "comm/exchange_cases.h"

namespace annulus {
namespace {

using testing::CaseLayout;
using testing::CaseMask;
using testing::ExchangeCaseMaker;

constexpr Pass kPasses[] = {Pass::kForward, Pass::kBackward};

// Plans by hand: each computing step takes seconds of its own, a row is a byte. Slot 0 of each rank holds KV,
// slot 1 partial outputs.
class HandMade {
 public:
  explicit HandMade(int ranks) {
    plan.name = "by hand";
    plan.problem.ranks = ranks;
    plan.groups = {{}};
    for (int r = 0; r < ranks; ++r)
      plan.ranks.push_back({.slots = {{.payload = Payload::kKv}, {.payload = Payload::kOutput}}});
    seconds.resize(static_cast<size_t>(ranks));
  }

  int Compute(int rank, double takes, std::vector<int> after = {}) {
    return Add(rank, {.kind = StepKind::kAttend, .after = std::move(after)}, takes);
  }

  struct Ends {
    int send = 0, receive = 0;
  };
  struct Move {
    int from = 0, to = 0;
    int64_t bytes = 0;
    int slot = 0;
    std::vector<int> send_after = {}, receive_after = {};
  };
  Ends Add(const Move& move) {
    Step step{.kind = StepKind::kSend,
              .slot = move.slot,
              .rows = {move.from, {0, move.bytes}},
              .peer = move.to,
              .message = messages_++,
              .after = move.send_after};
    const int send = Add(move.from, step, 0);
    step.kind = StepKind::kReceive;
    step.peer = move.from;
    step.after = move.receive_after;
    return {send, Add(move.to, step, 0)};
  }

  ExchangeCost Cost() const {
    return {.compute_seconds = [this](int r, size_t s) { return seconds[static_cast<size_t>(r)][s]; },
            .row_bytes = [](const SlotSpec&) { return 1.0; }};
  }

  ExchangePlan plan;
  std::vector<std::vector<double>> seconds;  // [rank][step]

 private:
  int Add(int rank, const Step& step, double takes) {
    std::vector<Step>& steps = plan.ranks[static_cast<size_t>(rank)].steps;
    steps.push_back(step);
    seconds[static_cast<size_t>(rank)].push_back(takes);
    return static_cast<int>(steps.size()) - 1;
  }
  int messages_ = 0;
};

double EndOf(const Simulation& run, int rank, int step) {
  return run.steps[static_cast<size_t>(rank)][static_cast<size_t>(step)].end;
}

// Rank 1 computes 4 s on what it has and 3 s on each of two messages, which come after 2 and 9 s.
TEST(Simulate, KeysAreTakenAsTheyCome) {
  for (const double before : {0.0, 5.0}) {
    HandMade made(2);
    if (before > 0) made.Compute(1, before);
    const auto first = made.Add({.from = 0, .to = 1, .bytes = 2}),
               second = made.Add({.from = 0, .to = 1, .bytes = 7});
    const int attend = made.Compute(1, 10, {first.receive, second.receive});
    Attend& taking = made.plan.ranks[1].steps[static_cast<size_t>(attend)].attend;
    taking.kv_slot = 0, taking.arrival = KeyArrival::kDuring;
    ExchangeCost cost = made.Cost();
    cost.egress_bytes_per_second = 1;

    EXPECT_DOUBLE_EQ(Simulate(made.plan, cost).makespan, 19) << "once all is there";
    cost.arrival_seconds = [&](int r, size_t s, size_t) {
      EXPECT_EQ(r, 1);
      EXPECT_EQ(s, static_cast<size_t>(attend));
      return 3.0;
    };
    const Simulation run = Simulate(made.plan, cost);
    const StepTiming& timing = run.steps[1][static_cast<size_t>(attend)];
    EXPECT_DOUBLE_EQ(timing.start, before);
    EXPECT_DOUBLE_EQ(timing.end, before > 0 ? 15 : 12);  // from 7 to 9 it waits for the second
    EXPECT_DOUBLE_EQ(run.compute[1], before + 10);
    EXPECT_DOUBLE_EQ(run.exposed[1], before > 0 ? 0 : 2);
    EXPECT_DOUBLE_EQ(run.makespan, timing.end);
  }
}

// Two ranks: blocks cross while each computes on its own.
TEST(Simulate, HidesTransfersBehindComputing) {
  HandMade made(2);
  for (int r = 0; r < 2; ++r) made.Compute(r, 1);
  const HandMade::Ends first = made.Add({.from = 0, .to = 1, .bytes = 50});
  const HandMade::Ends second = made.Add({.from = 1, .to = 0, .bytes = 50});
  made.Compute(0, 1, {second.receive});
  made.Compute(1, 1, {first.receive});
  ExchangeCost cost = made.Cost();
  cost.egress_bytes_per_second = 100;
  cost.message_seconds = 0.25;
  Simulation run = Simulate(made.plan, cost);
  EXPECT_DOUBLE_EQ(run.makespan, 2.0);
  for (size_t r = 0; r < 2; ++r) {
    EXPECT_DOUBLE_EQ(run.compute[r], 2.0);
    EXPECT_NEAR(run.exposed[r], 0, 1e-12);
    EXPECT_EQ(run.bytes_sent[r], 50);
  }
  // 10 times slower: 5 s + 0.25 s, of which 1 s is hidden.
  cost.egress_bytes_per_second = 10;
  run = Simulate(made.plan, cost);
  EXPECT_DOUBLE_EQ(run.makespan, 6.25);
  EXPECT_DOUBLE_EQ(run.exposed[0], 4.25);
  EXPECT_DOUBLE_EQ(EndOf(run, 0, 1), 5.0);  // the latency is the receiver's
  EXPECT_DOUBLE_EQ(EndOf(run, 1, 1), 5.25);
}

TEST(Simulate, AMessageWaitsForBothOfItsEnds) {
  HandMade made(2);
  const int slow = made.Compute(1, 3);
  const int sender = made.Compute(0, 1);
  const HandMade::Ends ends =
      made.Add({.from = 0, .to = 1, .bytes = 10, .send_after = {sender}, .receive_after = {slow}});
  ExchangeCost cost = made.Cost();
  cost.link_bytes_per_second = [](int, int) { return 10.0; };
  const Simulation run = Simulate(made.plan, cost);
  EXPECT_DOUBLE_EQ(run.steps[0][static_cast<size_t>(ends.send)].start, 3);
  EXPECT_DOUBLE_EQ(run.makespan, 4);
  EXPECT_DOUBLE_EQ(run.exposed[0], 3);
  EXPECT_DOUBLE_EQ(run.exposed[1], 1);
}

// A switch: both directions of a ring share the egress. Links side by side: they do not.
TEST(Simulate, DirectionsShareEgressButNotLinks) {
  HandMade both(3), one(3);
  for (int r = 0; r < 3; ++r) {
    one.Add({.from = r, .to = (r + 1) % 3, .bytes = 200});
    both.Add({.from = r, .to = (r + 1) % 3, .bytes = 100});
    both.Add({.from = r, .to = (r + 2) % 3, .bytes = 100});
  }
  ExchangeCost egress = one.Cost(), links = one.Cost();
  egress.egress_bytes_per_second = 100;
  links.link_bytes_per_second = [](int, int) { return 100.0; };
  EXPECT_DOUBLE_EQ(Simulate(one.plan, egress).makespan, 2);
  EXPECT_DOUBLE_EQ(Simulate(both.plan, egress).makespan, 2);
  EXPECT_DOUBLE_EQ(Simulate(one.plan, links).makespan, 2);
  EXPECT_DOUBLE_EQ(Simulate(both.plan, links).makespan, 1);
}

// 50 and 100 bytes at 100 B/s together: the shorter has half the rate until 1 s, the longer then all of it.
TEST(Simulate, FlowsShareEgressAndIngressEvenly) {
  HandMade out(3), in(3);
  out.Add({.from = 0, .to = 1, .bytes = 50});
  out.Add({.from = 0, .to = 2, .bytes = 100});
  in.Add({.from = 1, .to = 0, .bytes = 50});
  in.Add({.from = 2, .to = 0, .bytes = 100});
  ExchangeCost cost = out.Cost();
  cost.egress_bytes_per_second = 100;
  Simulation run = Simulate(out.plan, cost);
  EXPECT_DOUBLE_EQ(EndOf(run, 0, 0), 1.0);
  EXPECT_DOUBLE_EQ(EndOf(run, 0, 1), 1.5);
  EXPECT_EQ(run.bytes_sent[0], 150);
  cost = in.Cost();
  cost.ingress_bytes_per_second = 100;
  run = Simulate(in.plan, cost);
  EXPECT_DOUBLE_EQ(EndOf(run, 0, 0), 1.0);
  EXPECT_DOUBLE_EQ(EndOf(run, 0, 1), 1.5);
  // Without limits nothing takes time.
  EXPECT_EQ(Simulate(out.plan, out.Cost()).makespan, 0);
}

// Messages of a lane follow each other, each with its overhead; operands and results have a lane each and
// share the link.
TEST(Simulate, LanesMoveOneMessageAtATime) {
  HandMade same(2), apart(2);
  for (const int slot : {0, 1}) {
    same.Add({.from = 0, .to = 1, .bytes = 100});
    apart.Add({.from = 0, .to = 1, .bytes = 100, .slot = slot});
  }
  ExchangeCost cost = same.Cost();
  cost.link_bytes_per_second = [](int, int) { return 100.0; };
  cost.message_overhead_seconds = 0.25;
  const Simulation one = Simulate(same.plan, cost), two = Simulate(apart.plan, cost);
  EXPECT_DOUBLE_EQ(EndOf(one, 0, 0), 1.25);
  EXPECT_DOUBLE_EQ(EndOf(one, 0, 1), 2.5);
  EXPECT_DOUBLE_EQ(EndOf(two, 0, 0), 2.25);
  EXPECT_DOUBLE_EQ(EndOf(two, 0, 1), 2.25);
}

// Rank 0 sends little to rank 1 and much to rank 2 at once, on one lane: with rounds rank 1 gets its next
// message only when both are over.
TEST(Simulate, RoundsEndTogether) {
  HandMade made(5);
  const HandMade::Ends little = made.Add({.from = 0, .to = 1, .bytes = 10});
  made.Add({.from = 0, .to = 2, .bytes = 100});
  const HandMade::Ends next = made.Add(
      {.from = 0, .to = 1, .bytes = 10, .send_after = {little.send}, .receive_after = {little.receive}});
  ExchangeCost cost = made.Cost();
  cost.link_bytes_per_second = [](int, int) { return 10.0; };
  EXPECT_DOUBLE_EQ(EndOf(Simulate(made.plan, cost), 1, next.receive), 2);
  cost.order = MessageOrder::kRounds;
  EXPECT_DOUBLE_EQ(EndOf(Simulate(made.plan, cost), 1, next.receive), 11);
}

// 0.5 s at half speed, then the other 0.75 s at full speed.
TEST(Simulate, ComputingSlowsWhileMessagesMove) {
  HandMade made(2);
  made.Compute(0, 1);
  made.Add({.from = 0, .to = 1, .bytes = 50});
  ExchangeCost cost = made.Cost();
  cost.egress_bytes_per_second = 100;
  cost.computing_slowdown = 2;
  const Simulation run = Simulate(made.plan, cost);
  EXPECT_DOUBLE_EQ(EndOf(run, 0, 0), 1.25);
  EXPECT_DOUBLE_EQ(run.compute[0], 1.25);
  EXPECT_EQ(run.exposed[0], 0);
}

// ---- Built plans --------------------------------------------------------------------------------

ExchangeProblem ZigzagCausal(int ranks, int64_t rows, const PlanChoice& choice, int64_t heads = 4) {
  return ExchangeCaseMaker(4)
      .Make(ranks, rows, ranks * rows, CaseLayout::kZigzag, CaseMask::kCausal,
            {.parts = ChunkParts(choice), .heads = heads, .kv_heads = heads})
      .problem;
}

// MHA: a query, key, value or output row is a unit of each head; gradients are twice as wide.
ExchangeCost CostOf(const ExchangePlan& plan, double seconds_per_pair, double link) {
  const double heads = static_cast<double>(plan.problem.heads);
  return {
      .compute_seconds =
          [&plan, seconds_per_pair, heads](int r, size_t s) {
            const Step& step = plan.ranks[static_cast<size_t>(r)].steps[s];
            double pairs = 0;
            for (const BlockPair& pair : step.attend.pairs) pairs += static_cast<double>(pair.pairs);
            const int group =
                step.kind == StepKind::kAttend
                    ? plan.ranks[static_cast<size_t>(r)].slots[static_cast<size_t>(step.attend.q_slot)].group
                    : 0;
            const auto part = static_cast<double>(plan.groups[static_cast<size_t>(group)].q_heads());
            return pairs * seconds_per_pair * part / heads;
          },
      .row_bytes =
          [&plan, heads](const SlotSpec& slot) {
            const double part =
                slot.group == kAllHeads
                    ? heads
                    : static_cast<double>(plan.groups[static_cast<size_t>(slot.group)].q_heads());
            const double units[kPayloads] = {plan.pass == Pass::kForward ? 1.0 : 2.0, 2, 1, 2, 4};
            return units[static_cast<size_t>(slot.payload)] * part;
          },
      .link_bytes_per_second = [link](int, int) { return link; }};
}

ExchangePlan PlanFor(const ExchangeProblem& problem, Pass pass, const PlanChoice& choice) {
  absl::StatusOr<ExchangePlan> plan = BuildPlan(problem, pass, choice);
  ANNULUS_CHECK(plan.ok()) << plan.status();
  return *std::move(plan);
}

// Every kind of plan on random masks: the order of the plan is kept, lanes are not exceeded, and two runs
// agree to the bit.
TEST(Simulate, BoundsHoldForRandomPlans) {
  for (uint64_t seed = 0; seed < 24; ++seed) {
    ExchangeCaseMaker maker(seed + 900);
    const int ranks = static_cast<int>(1 + maker.Below(8));
    for (const PlanChoice& choice : AllChoices(ranks, 4)) {
      const auto layout = static_cast<CaseLayout>(maker.Below(4));
      const auto mask = static_cast<CaseMask>(maker.Below(5));
      const testing::ExchangeCase made =
          maker.Make(ranks, 8, 8 * ranks - static_cast<int64_t>(maker.Below(4)), layout, mask,
                     {.parts = ChunkParts(choice), .heads = 4, .kv_heads = 4});
      SCOPED_TRACE(made.name + ", " + NameOf(choice, ranks));
      const ExchangePlan plan = PlanFor(made.problem, kPasses[seed % 2], choice);
      ExchangeCost cost = CostOf(plan, 1e-3, 400);
      cost.egress_bytes_per_second = 500;
      cost.message_seconds = 0.01;
      cost.message_overhead_seconds = 0.02;
      cost.order = seed % 4 < 2 ? MessageOrder::kFree : MessageOrder::kRounds;
      const Simulation run = Simulate(plan, cost), again = Simulate(plan, cost);
      EXPECT_EQ(run.makespan, again.makespan);
      for (size_t r = 0; r < plan.ranks.size(); ++r) {
        const RankPlan& rank = plan.ranks[r];
        EXPECT_GE(run.makespan + 1e-9, run.compute[r] + run.exposed[r]);
        EXPECT_GE(run.makespan + 1e-9, static_cast<double>(run.bytes_sent[r]) / cost.egress_bytes_per_second);
        EXPECT_GE(run.exposed[r], -1e-9);
        double sent = 0;
        for (size_t s = 0; s < rank.steps.size(); ++s) {
          const Step& step = rank.steps[s];
          EXPECT_EQ(run.steps[r][s].start, again.steps[r][s].start);
          EXPECT_EQ(run.steps[r][s].end, again.steps[r][s].end);
          for (const int before : step.after) {
            EXPECT_GE(run.steps[r][s].start + 1e-12, run.steps[r][static_cast<size_t>(before)].end);
          }
          if (step.kind != StepKind::kSend) continue;
          const double bytes = static_cast<double>(step.rows.rows.size()) *
                               cost.row_bytes(rank.slots[static_cast<size_t>(step.slot)]);
          sent += bytes;
          EXPECT_GE(run.steps[r][s].end - run.steps[r][s].start + 1e-9,
                    cost.message_overhead_seconds + bytes / 400);
        }
        EXPECT_EQ(static_cast<double>(run.bytes_sent[r]), sent);
      }
    }
  }
}

// Computing that outlasts the transfers hides them, but for what must come before and after it.
TEST(Simulate, RingsExposeOnlyTheirEnds) {
  for (const PlanKind kind : {PlanKind::kKvRing, PlanKind::kTokenRing}) {
    for (const Pass pass : kPasses) {
      const ExchangePlan plan = PlanFor(ZigzagCausal(8, 16, {.kind = kind}), pass, {.kind = kind});
      const ExchangeCost cost = CostOf(plan, 1e-3, 4000);
      const Simulation run = Simulate(plan, cost);
      const double result_home = 16 * 16 / 4000.0;
      for (size_t r = 0; r < 8; ++r) {
        EXPECT_LT(run.exposed[r], 0.1 * run.compute[r] + 2 * result_home) << Timeline(plan, run);
      }
    }
  }
}

TEST(Simulate, FasterLinksAreNeverSlower) {
  for (const int ranks : {2, 3, 4, 6, 8}) {
    for (const PlanChoice& choice : AllChoices(ranks, 4)) {
      for (const Pass pass : kPasses) {
        const ExchangePlan plan = PlanFor(ZigzagCausal(ranks, 8, choice), pass, choice);
        double before = Simulate(plan, CostOf(plan, 1e-3, 50)).makespan;
        for (const double link : {100.0, 400.0, 1600.0, 6400.0, 0.0}) {
          const double now = Simulate(plan, CostOf(plan, 1e-3, link)).makespan;
          EXPECT_LE(now, before * (1 + 1e-9)) << plan.name << ", " << ranks << " ranks, link " << link;
          before = now;
        }
      }
    }
  }
}

// Where each ordered pair of ranks has a slow link of its own, both ways round the ring carry half each.
// (Partial outputs of a token ring return over links that its queries do not use: with few ranks that leaves
// less to gain.)
TEST(Simulate, BothWaysRoundSlowLinksAreFaster) {
  const auto seconds = [](int ranks, Pass pass, PlanKind kind) {
    const ExchangePlan plan = PlanFor(ZigzagCausal(ranks, 64, {.kind = kind}), pass, {.kind = kind});
    return Simulate(plan, CostOf(plan, 1e-6, 1000)).makespan;
  };
  for (const Pass pass : kPasses) {
    for (const int ranks : {4, 8}) {
      EXPECT_GE(
          seconds(ranks, pass, PlanKind::kKvRing) / seconds(ranks, pass, PlanKind::kBidirectionalKvRing),
          1.5);
    }
    EXPECT_GE(seconds(8, pass, PlanKind::kTokenRing) / seconds(8, pass, PlanKind::kBidirectionalTokenRing),
              1.5);
  }
}

// ---- Pictures -----------------------------------------------------------------------------------

// Queries of rank 1 come to rank 0, and their output goes back; rank 1 copies, rank 0 adds up nothing.
TEST(Timeline, ShowsWhatIsComputedAndWhatArrives) {
  HandMade made(2);
  const auto on = [&](int rank, int step, std::vector<int> q, int kv) {
    Attend& attend = made.plan.ranks[static_cast<size_t>(rank)].steps[static_cast<size_t>(step)].attend;
    for (const int block : q) attend.q_rows.push_back({block, {0, 4}});
    attend.kv_rows = {{kv, {0, 4}}};
  };
  on(0, made.Compute(0, 0.5), {0}, 0);
  on(1, made.Compute(1, 1), {0, 1}, 1);
  made.plan.ranks[0].slots[0].payload = Payload::kQuery;
  made.plan.ranks[1].slots[0].payload = Payload::kQuery;
  const HandMade::Ends queries = made.Add({.from = 1, .to = 0, .bytes = 4});
  const int foreign = made.Compute(0, 0.8, {queries.receive});
  on(0, foreign, {1}, 0);
  const HandMade::Ends outputs =
      made.Add({.from = 0, .to = 1, .bytes = 2, .slot = 1, .send_after = {foreign}});
  made.plan.ranks[0].steps[static_cast<size_t>(outputs.send)].rows.block = 1;
  made.plan.ranks[1].steps[static_cast<size_t>(outputs.receive)].rows.block = 1;
  const int added = made.Compute(1, 0.2, {outputs.receive});
  made.plan.ranks[1].steps[static_cast<size_t>(added)].kind = StepKind::kReduce;
  ExchangeCost cost = made.Cost();
  cost.link_bytes_per_second = [](int, int) { return 4.0; };
  EXPECT_EQ(Timeline(made.plan, Simulate(made.plan, cost), 25),
            "by hand, forward: predicted 2500.000 ms; a letter is a block, '*' several, '.' waits to "
            "compute, '+' adds "
            "results up, '~' copies\n"
            "rank 0   on queries |00000.....11111111       |  exposed 1000.000 ms\n"
            "         queries in |1111111111               |\n"
            "         results in |                         |\n"
            "rank 1   on queries |**********.............++|  exposed 1300.000 ms\n"
            "         queries in |                         |\n"
            "         results in |                  11111  |\n");
}

int Count(const std::string& svg, const std::string& what) {
  int count = 0;
  for (size_t at = svg.find(what); at != std::string::npos; at = svg.find(what, at + 1)) ++count;
  return count;
}

TEST(TimelineSvg, HasABarAndATitleForEveryStepButSends) {
  const PlanChoice choice{.kind = PlanKind::kTokenRing};
  const ExchangePlan plan = PlanFor(ZigzagCausal(4, 8, choice), Pass::kBackward, choice);
  const Simulation run = Simulate(plan, CostOf(plan, 1e-3, 100));
  const std::string svg = TimelineSvg(plan, run);
  int computing = 0, queries = 0, gradients = 0;
  for (const RankPlan& rank : plan.ranks) {
    for (const Step& step : rank.steps) {
      computing += IsCompute(step.kind) ? 1 : 0;
      if (step.kind != StepKind::kReceive) continue;
      const Payload payload = rank.slots[static_cast<size_t>(step.slot)].payload;
      queries += payload == Payload::kQuery ? 1 : 0;
      gradients += payload == Payload::kQueryGrad ? 1 : 0;
    }
  }
  // Each also stands in the legend.
  EXPECT_EQ(Count(svg, "<path class=\"attend\"") + Count(svg, "<path class=\"reduce\""), computing + 2);
  EXPECT_EQ(Count(svg, "<path class=\"query\""), queries + 1);
  EXPECT_EQ(Count(svg, "<path class=\"qgrad\""), gradients + 1);
  EXPECT_EQ(Count(svg, "<title>"), Count(svg, "</title></path>"));
  EXPECT_EQ(Count(svg, "<title>"), computing + queries + gradients + Count(svg, "<path class=\"wait\"") - 1);
  EXPECT_EQ(Count(svg, "<g "), Count(svg, "</g>"));
  EXPECT_GT(Count(svg, "rank 3 step"), 0);
  // Nothing is fetched, and both color schemes are there.
  EXPECT_EQ(Count(svg, "http"), 1);  // the namespace
  EXPECT_EQ(Count(svg, "prefers-color-scheme:dark"), 1);
}

TEST(TimelineSvg, StaysSmall) {
  for (const PlanKind kind : {PlanKind::kKvRing, PlanKind::kAllGather, PlanKind::kBidirectionalTokenRing}) {
    const ExchangePlan plan = PlanFor(ZigzagCausal(64, 16, {.kind = kind}), Pass::kBackward, {.kind = kind});
    EXPECT_LT(TimelineSvg(plan, Simulate(plan, CostOf(plan, 1e-3, 1000))).size(), size_t{1} << 20)
        << plan.name;
  }
}

}  // namespace
}  // namespace annulus
