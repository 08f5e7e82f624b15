// ranks: 2 3 4
// Executions by the host over throttled links, as they are measured.

#include "comm/exchange_execute_checks.h"
#include "comm/measured_timeline.h"
#include "support/mpi_main.h"

namespace annulus {
namespace {

using testing::CheckMeasured;

constexpr double kMessageSeconds = 10e-3;

// Every rank computes each pair of blocks as long as a message takes.
class ThrottledRing {
 public:
  explicit ThrottledRing(PlanKind kind, Pass pass) {
    const int ranks = testing::World().size();
    const PlanChoice choice{.kind = kind};
    made_ = testing::ExchangeCaseMaker(1).Make(ranks, 4, 4 * ranks, testing::CaseLayout::kContiguous,
                                               testing::CaseMask::kFull, {.parts = ChunkParts(choice)});
    plan_ = BuildPlan(made_.problem, pass, choice).value();
    const double message_bytes =
        4.0 * static_cast<double>(testing::ToyRowBytes(plan_, {})) / ChunkParts(choice);
    transport_ =
        testing::HostTransport(testing::World(), {.bytes_per_second = message_bytes / kMessageSeconds});
  }

  const ExchangePlan& plan() const { return plan_; }

  Simulation Measure() {
    Communicator world = testing::World();
    Context ctx{Device{}};
    StepClock clock(ctx.device);
    testing::ToyRank rank(made_, plan_, world.rank());
    EXPECT_TRUE(clock.Start(ctx, world).ok());
    ExchangeStats stats{.clock = &clock};
    const ExchangeBinding binding{.slots = rank.slots(), .compute = [&](const Step& step) {
                                    const double end = testing::Now() + kMessageSeconds;
                                    rank.Compute(step);
                                    for (ctx.Poll(); testing::Now() < end; ctx.Poll())
                                      std::this_thread::sleep_for(std::chrono::microseconds(50));
                                    return absl::OkStatus();
                                  }};
    EXPECT_TRUE(transport_->Execute(ctx, plan_, binding, &stats).ok());
    EXPECT_EQ(rank.Compare(), "");
    absl::StatusOr<Simulation> measured = clock.Take(plan_, world);
    EXPECT_TRUE(measured.ok()) << measured.status();
    if (!measured.ok()) return {};
    EXPECT_EQ(measured->bytes_sent[static_cast<size_t>(world.rank())], stats.bytes_sent);
    CheckMeasured(plan_, *measured);
    CheckDurations(*measured);
    return *std::move(measured);
  }

 private:
  // Links keep messages for as long as their bytes take at least, computing takes what it is made to.
  void CheckDurations(const Simulation& measured) const {
    for (size_t r = 0; r < plan_.ranks.size(); ++r) {
      for (size_t s = 0; s < plan_.ranks[r].steps.size(); ++s) {
        const StepTiming& timing = measured.steps[r][s];
        EXPECT_GE(timing.end - timing.start, 0.999 * kMessageSeconds)
            << StepText(plan_, static_cast<int>(r), s);
      }
    }
  }

  testing::ExchangeCase made_;
  ExchangePlan plan_;
  std::unique_ptr<ExchangeTransport> transport_;
};

// The halves of all blocks go both ways at once; other load can only take some of that away, so the best of a
// few executions counts.
TEST(MeasuredTimeline, ShowsBothDirectionsAtOnce) {
  ASSERT_GE(testing::World().size(), 2) << "needs ranks to exchange with";
  ThrottledRing ring(PlanKind::kBidirectionalKvRing, Pass::kForward);
  double both_ways = 0, under_compute = 0;
  for (int i = 0; i < 5; ++i) {
    const TimelineOverlap overlap = OverlapOf(ring.plan(), ring.Measure());
    ASSERT_GT(overlap.shorter_way, 0);
    ASSERT_GT(overlap.transfers, 0);
    both_ways = std::max(both_ways, overlap.both_ways / overlap.shorter_way);
    under_compute = std::max(under_compute, overlap.under_compute / overlap.transfers);
  }
  EXPECT_GT(both_ways, 0.8);
  EXPECT_GT(under_compute, 0.8);
}

// One way round a ring of three and more no two ranks send to each other.
TEST(MeasuredTimeline, ShowsOneDirection) {
  ThrottledRing ring(PlanKind::kKvRing, Pass::kForward);
  const TimelineOverlap overlap = OverlapOf(ring.plan(), ring.Measure());
  EXPECT_EQ(overlap.shorter_way > 0, testing::World().size() == 2);
  EXPECT_EQ(overlap.both_ways > 0, testing::World().size() == 2);
}

TEST(MeasuredTimeline, IsTheSameOnEveryRankAndDrawn) {
  ThrottledRing ring(PlanKind::kBidirectionalKvRing, Pass::kForward);
  const Simulation measured = ring.Measure();
  const std::string text = Timeline(ring.plan(), measured), svg = TimelineSvg(ring.plan(), measured);
  EXPECT_NE(text.find(": measured "), std::string::npos) << text;
  EXPECT_NE(svg.find(" ranks: measured "), std::string::npos);
  for (const std::string& drawn : {text, svg}) {
    const std::vector<std::string> all = testing::World().AllGatherStrings(drawn).value();
    for (const std::string& other : all) EXPECT_EQ(drawn, other);
  }
}

}  // namespace
}  // namespace annulus
