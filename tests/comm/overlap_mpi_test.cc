// ranks: 2 4
#include <chrono>
#include <thread>

#include "comm/exchange_cases.h"
#include "support/mpi_main.h"

namespace annulus {
namespace {

constexpr double kDelaySeconds = 1e-3;

struct Sample {
  double exposed = 0, attend = 0;  // seconds, the worst rank's
};

testing::ExchangeCase FullMask() {
  constexpr int64_t kRows = 8;
  const int ranks = testing::World().size();
  return testing::ExchangeCaseMaker(1).Make(ranks, kRows, kRows * ranks, testing::CaseLayout::kContiguous,
                                            testing::CaseMask::kFull);
}

double Simulated(Pass pass, double attend_seconds) {
  const testing::ExchangeCase made = FullMask();
  const double pairs = static_cast<double>(made.problem.pairs[0]);
  const Simulation simulation =
      Simulate(BuildKvRing(made.problem, pass),
               {.seconds_per_pair = attend_seconds / pairs, .message_seconds = kDelaySeconds});
  return *std::max_element(simulation.exposed.begin(), simulation.exposed.end());
}

// Every rank attends to every block for `attend_seconds`; messages take 1 ms. 30 runs, since ranks share
// cores with each other and with whatever else runs.
std::vector<Sample> Measured(Pass pass, double attend_seconds) {
  using Clock = std::chrono::steady_clock;
  Communicator world = testing::World();
  Communicator slow = WithMessageDelay(world, kDelaySeconds * 1e6);
  const testing::ExchangeCase made = FullMask();
  const ExchangePlan plan = BuildKvRing(made.problem, pass);
  std::vector<Sample> samples;
  for (int i = 0; i < 30; ++i) {
    Context ctx{Device{}};
    testing::ToyRank rank(made, plan, world.rank());
    double attended = 0;
    ExchangeBinding binding{.slots = rank.refs(), .attend = [&](const Step& step) {
                              const Clock::time_point begin = Clock::now();
                              rank.Attend(step);
                              const auto elapsed = [&] {
                                return std::chrono::duration<double>(Clock::now() - begin).count();
                              };
                              do {
                                std::this_thread::sleep_for(std::chrono::microseconds(20));
                                ctx.Poll();
                              } while (elapsed() < attend_seconds);
                              attended += elapsed();
                              return absl::OkStatus();
                            }};
    ExchangeStats stats;
    EXPECT_TRUE(world.Barrier().ok());
    EXPECT_TRUE(Execute(ctx, plan, slow, binding, &stats).ok());
    EXPECT_EQ(rank.Compare(), "");
    samples.push_back({.exposed = world.AllReduceValue(stats.exposed_seconds, ReduceOp::kMax).value(),
                       .attend = world.AllReduceValue(attended, ReduceOp::kMax).value()});
  }
  return samples;
}

class Overlap : public ::testing::TestWithParam<Pass> {};

TEST_P(Overlap, LongComputeHidesTheExchange) {
  ASSERT_GE(testing::World().size(), 2) << "needs ranks to exchange with";
  constexpr double kAttendSeconds = 5e-3;
  const double compute = kAttendSeconds * testing::World().size();
  EXPECT_LT(Simulated(GetParam(), kAttendSeconds), 0.2 * compute);
  // Other load only adds to what is exposed.
  const std::vector<Sample> samples = Measured(GetParam(), kAttendSeconds);
  const Sample& best = *std::min_element(
      samples.begin(), samples.end(), [](const Sample& a, const Sample& b) { return a.exposed < b.exposed; });
  EXPECT_LT(best.exposed, 0.2 * compute);
}

TEST_P(Overlap, ShortComputeDoesNot) {
  ASSERT_GE(testing::World().size(), 2) << "needs ranks to exchange with";
  constexpr double kAttendSeconds = 0.1e-3;
  const int hops = testing::World().size() - 1;
  EXPECT_GT(Simulated(GetParam(), kAttendSeconds), 0.5e-3 * hops);
  // An attend that other load stretches hides more, so the run with the shortest ones counts.
  const std::vector<Sample> samples = Measured(GetParam(), kAttendSeconds);
  const Sample& best = *std::min_element(
      samples.begin(), samples.end(), [](const Sample& a, const Sample& b) { return a.attend < b.attend; });
  EXPECT_GT(best.exposed, 0.5e-3 * hops) << "attends took " << best.attend << " s";
}

INSTANTIATE_TEST_SUITE_P(Passes, Overlap, ::testing::Values(Pass::kForward, Pass::kBackward));

}  // namespace
}  // namespace annulus
