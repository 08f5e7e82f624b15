// ranks: 2 3 4
// Compute hides the exchange as far as the simulation of the same plan says, and no farther.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>

#include "annulus/comm/exchange_simulate.h"
#include "annulus/comm/forwarding_backend.h"
#include "comm/exchange_execute_checks.h"
#include "support/mpi_main.h"

namespace annulus {
namespace {

constexpr double kDelaySeconds = 1e-3;
constexpr double kRequestSeconds = 0.1e-3;
constexpr double kMarginSeconds = 0.5e-3;
constexpr double kLimitSeconds = 20;

// A receive asks for its message, and only then does the sender send it, as MPI does with large messages:
// unless both sides poll while they compute, a message travels only after it. (Small ones travel by
// themselves, which would hide an exchange that makes no progress.)
class RequestedReceive : public RequestState {
 public:
  TensorRef request() { return TensorRef(&content_, DType::kI64, Device{}, Shape{1}); }
  void Track(Request request, Request data) {
    request_ = std::move(request);
    data_ = std::move(data);
  }
  absl::StatusOr<bool> Test() override {
    ANNULUS_ASSIGN_OR_RETURN(const bool requested, request_.Test());
    ANNULUS_ASSIGN_OR_RETURN(const bool arrived, data_.Test());
    return requested && arrived;
  }

 private:
  int64_t content_ = 0;
  Request request_, data_;
};

class RequestedSend : public RequestState {
 public:
  RequestedSend(Communicator comm, ConstTensorRef data, int peer, int tag)
      : comm_(std::move(comm)), data_(data), peer_(peer), tag_(tag) {}
  TensorRef request() { return TensorRef(&content_, DType::kI64, Device{}, Shape{1}); }
  void Track(Request request) { request_ = std::move(request); }
  absl::StatusOr<bool> Test() override {
    if (!sends_) {
      ANNULUS_ASSIGN_OR_RETURN(sends_, request_.Test());
      if (!sends_) return false;
      ANNULUS_ASSIGN_OR_RETURN(sending_, comm_.Send(data_, peer_, tag_));
    }
    return sending_.Test();
  }

 private:
  Communicator comm_;
  const ConstTensorRef data_;
  const int peer_, tag_;
  int64_t content_ = 0;
  bool sends_ = false;
  Request request_, sending_;
};

class RequestedComm : public ForwardingBackend {
 public:
  RequestedComm(Communicator data, Communicator requests)
      : ForwardingBackend(std::move(data)), requests_(std::move(requests)) {}

  absl::StatusOr<Request> Send(ConstTensorRef data, int peer, int tag) override {
    auto state = std::make_unique<RequestedSend>(inner(), data, peer, tag);
    ANNULUS_ASSIGN_OR_RETURN(Request request, requests_.Receive(state->request(), peer, tag));
    state->Track(std::move(request));
    return Request(std::move(state));
  }
  absl::StatusOr<Request> Receive(TensorRef data, int peer, int tag) override {
    auto state = std::make_unique<RequestedReceive>();
    ANNULUS_ASSIGN_OR_RETURN(Request request, requests_.Send(state->request(), peer, tag));
    ANNULUS_ASSIGN_OR_RETURN(Request body, inner().Receive(data, peer, tag));
    state->Track(std::move(request), std::move(body));
    return Request(std::move(state));
  }
  absl::StatusOr<std::shared_ptr<CommBackend>> Split(int color, int key) override {
    ANNULUS_ASSIGN_OR_RETURN(Communicator data, inner().Split(color, key));
    ANNULUS_ASSIGN_OR_RETURN(Communicator requests, requests_.Split(color, key));
    return std::shared_ptr<CommBackend>(
        std::make_shared<RequestedComm>(std::move(data), std::move(requests)));
  }

 private:
  Communicator requests_;
};

Communicator SlowGroup() {
  Communicator requests = testing::World().Split(0, testing::World().rank()).value();
  return Communicator(
      std::make_shared<RequestedComm>(WithMessageDelay(testing::World(), kDelaySeconds * 1e6),
                                      WithMessageDelay(std::move(requests), kRequestSeconds * 1e6)));
}

struct Subject {
  testing::ExchangeCase made;
  ExchangePlan plan;
};

// Every rank has as much to compute, in as many pieces.
Subject FullMask(PlanKind kind, Pass pass) {
  constexpr int64_t kRows = 8;
  const int ranks = testing::World().size();
  const PlanChoice choice{.kind = kind};
  Subject subject;
  subject.made =
      testing::ExchangeCaseMaker(1).Make(ranks, kRows, kRows * ranks, testing::CaseLayout::kContiguous,
                                         testing::CaseMask::kFull, {.parts = ChunkParts(choice)});
  subject.plan = BuildPlan(subject.made.problem, pass, choice).value();
  return subject;
}

// Of a step, where all of a block against all of another takes `block_seconds`.
double ComputeSeconds(const ExchangePlan& plan, const Step& step, double block_seconds) {
  double pairs = 0;
  for (const BlockPair& pair : step.attend.pairs) pairs += static_cast<double>(pair.pairs);
  return block_seconds * pairs / static_cast<double>(plan.problem.block_rows * plan.problem.block_rows);
}

// Exposed seconds of the worst rank.
double Simulated(const ExchangePlan& plan, double block_seconds) {
  const ExchangeCost cost{.compute_seconds =
                              [&](int cp_rank, size_t s) {
                                const Step& step = plan.ranks[static_cast<size_t>(cp_rank)].steps[s];
                                return ComputeSeconds(plan, step, block_seconds);
                              },
                          .row_bytes = [](const SlotSpec&) { return 0.0; },
                          .message_seconds = kDelaySeconds};
  const Simulation simulation = Simulate(plan, cost);
  return *std::max_element(simulation.exposed.begin(), simulation.exposed.end());
}

using testing::Now;

double WorstOfRanks(double value) { return testing::World().AllReduceValue(value, ReduceOp::kMax).value(); }

struct Run {
  double seconds = 0, exposed = 0;  // the worst rank's
};

Run RunOnce(const Subject& subject, Communicator slow, double block_seconds) {
  Context ctx{Device{}};
  testing::ToyRank rank(subject.made, subject.plan, slow.rank());
  const ExchangeBinding binding{.slots = rank.slots(), .compute = [&](const Step& step) {
                                  const double end =
                                      Now() + ComputeSeconds(subject.plan, step, block_seconds);
                                  rank.Compute(step);
                                  for (ctx.Poll(); Now() < end; ctx.Poll())
                                    std::this_thread::sleep_for(std::chrono::microseconds(20));
                                  return absl::OkStatus();
                                }};
  const std::unique_ptr<ExchangeTransport> transport = testing::HostTransport(slow);
  ExchangeStats stats;
  Run run;
  run.seconds = testing::TimedRun(
      testing::World(), [&] { EXPECT_TRUE(transport->Execute(ctx, subject.plan, binding, &stats).ok()); });
  EXPECT_EQ(rank.Compare(), "");
  run.exposed = WorstOfRanks(stats.exposed_seconds);
  return run;
}

// Exposed seconds of the worst rank in the shortest run: other load only adds to it. On a machine that is
// busy throughout such a run may take a while to come by, so there are more runs until one is within `margin`
// of `expected`, or the time is up.
double Measured(const Subject& subject, double block_seconds, double expected, double margin) {
  Communicator slow = SlowGroup();
  constexpr int kLeastRuns = 10;
  Run best{.seconds = 1e9};
  const double begin = Now();
  for (int i = 0;; ++i) {
    const bool agrees = std::abs(best.exposed - expected) < margin;
    if (i >= kLeastRuns && (agrees || WorstOfRanks(Now() - begin) > kLimitSeconds)) return best.exposed;
    const Run run = RunOnce(subject, slow, block_seconds);
    if (run.seconds < best.seconds) best = run;
  }
}

int Hops() { return testing::World().size() - 1; }

constexpr double kLong = 5e-3, kShort = 0.1e-3;

class OverlapOf : public ::testing::TestWithParam<PlanKind> {};
class KvOverlap : public OverlapOf {};
class QueryOverlap : public OverlapOf {};
class ShortCompute : public OverlapOf {};

TEST_P(KvOverlap, LongComputeHidesForward) {
  ASSERT_GE(testing::World().size(), 2) << "needs ranks to exchange with";
  const Subject subject = FullMask(GetParam(), Pass::kForward);
  EXPECT_NEAR(Simulated(subject.plan, kLong), 0, 1e-9);
  EXPECT_LT(Measured(subject, kLong, 0, kMarginSeconds), kMarginSeconds);
}

TEST_P(KvOverlap, LongComputeHidesBackwardButTheLastGradient) {
  ASSERT_GE(testing::World().size(), 2) << "needs ranks to exchange with";
  const Subject subject = FullMask(GetParam(), Pass::kBackward);
  const double simulated = Simulated(subject.plan, kLong);
  EXPECT_LE(simulated, kDelaySeconds + 1e-9);  // the last hop home, whatever the number of ranks
  const double margin = kMarginSeconds * Hops();
  EXPECT_NEAR(Measured(subject, kLong, simulated, margin), simulated, margin);
}

// The last result goes home behind the last computing, in both passes.
TEST_P(QueryOverlap, LongComputeHidesAllButTheLastResult) {
  ASSERT_GE(testing::World().size(), 2) << "needs ranks to exchange with";
  for (const Pass pass : testing::kPasses) {
    const Subject subject = FullMask(GetParam(), pass);
    const double simulated = Simulated(subject.plan, kLong);
    EXPECT_LE(simulated, kDelaySeconds + 1e-9);
    const double margin = kMarginSeconds * Hops();
    EXPECT_NEAR(Measured(subject, kLong, simulated, margin), simulated, margin);
  }
}

TEST_P(ShortCompute, ExposesWhatTheSimulationSays) {
  ASSERT_GE(testing::World().size(), 2) << "needs ranks to exchange with";
  for (const Pass pass : testing::kPasses) {
    const Subject subject = FullMask(GetParam(), pass);
    const double simulated = Simulated(subject.plan, kShort);
    EXPECT_GT(simulated, 0.8 * kDelaySeconds * Hops());
    const double margin = kMarginSeconds * Hops();
    EXPECT_NEAR(Measured(subject, kShort, simulated, margin), simulated, margin);
  }
}

constexpr PlanKind kKvKinds[] = {PlanKind::kKvRing, PlanKind::kBidirectionalKvRing, PlanKind::kDirectCast};
constexpr PlanKind kQueryKinds[] = {PlanKind::kTokenRing, PlanKind::kBidirectionalTokenRing};
const auto kNameOf = [](const ::testing::TestParamInfo<PlanKind>& kind) {
  return std::string(Name(kind.param));
};

INSTANTIATE_TEST_SUITE_P(Plans, KvOverlap, ::testing::ValuesIn(kKvKinds), kNameOf);
INSTANTIATE_TEST_SUITE_P(Plans, QueryOverlap, ::testing::ValuesIn(kQueryKinds), kNameOf);
INSTANTIATE_TEST_SUITE_P(Plans, ShortCompute, ::testing::Values(PlanKind::kKvRing, PlanKind::kTokenRing),
                         kNameOf);

}  // namespace
}  // namespace annulus
