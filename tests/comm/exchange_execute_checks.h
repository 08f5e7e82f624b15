#pragma once

// Plans run over a Communicator with toy attention and compared exactly; the same checks for every backend.

#include "comm/communicator_checks.h"
#include "comm/exchange_cases.h"

namespace annulus::testing {

inline void ExecuteAndCompare(Communicator comm, const ExchangeCase& made, const ExchangePlan& plan) {
  ASSERT_TRUE(AgreeOnPlan(plan, comm).ok());
  Context ctx{Device{}};
  int outer_polls = 0;
  ctx.progress = [&] { ++outer_polls; };
  ToyRank rank(made, plan, comm.rank());
  ExchangeBinding binding{.slots = rank.refs(), .attend = [&](const Step& step) {
                            ctx.Poll();
                            rank.Attend(step);
                            ctx.Poll();
                            return absl::OkStatus();
                          }};
  ExchangeStats stats;
  const absl::Status status = Execute(ctx, plan, comm, binding, &stats);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(rank.Compare(), "") << made.name << "\n" << ToString(plan);
  constexpr int64_t kRowBytes = 16;
  EXPECT_EQ(stats.bytes_sent, BytesSent(plan, comm.rank(), kRowBytes, kRowBytes));
  EXPECT_GE(stats.exposed_seconds, 0);
  EXPECT_GT(outer_polls, 0);  // what was polled before goes on
  outer_polls = 0;
  ctx.Poll();
  EXPECT_EQ(outer_polls, 1);
}

inline void CheckExecute(Communicator comm) {
  for (uint64_t seed = 0; seed < 12; ++seed) {
    ExchangeCaseMaker maker(seed);
    const ExchangeCase made = maker.MakeRandom(comm.size());
    for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
      for (const RingDirection direction : {RingDirection::kTowardLower, RingDirection::kTowardHigher}) {
        ExecuteAndCompare(comm, made, BuildKvRing(made.problem, pass, direction));
      }
    }
  }
}

// An attend that fails on one rank: that rank reports it, all others finish.
inline void CheckFailingAttend(Communicator comm) {
  const ExchangeCase made =
      ExchangeCaseMaker(3).Make(comm.size(), 4, 4 * comm.size(), CaseLayout::kContiguous, CaseMask::kFull);
  const ExchangePlan plan = BuildKvRing(made.problem, Pass::kBackward);
  Context ctx{Device{}};
  ToyRank rank(made, plan, comm.rank());
  const bool fails = comm.rank() == comm.size() - 1;
  int calls = 0;
  ExchangeBinding binding{.slots = rank.refs(), .attend = [&](const Step& step) -> absl::Status {
                            ++calls;
                            if (fails) return absl::InternalError("broken kernel");
                            rank.Attend(step);
                            return absl::OkStatus();
                          }};
  ExchangeStats stats;
  const absl::Status status = Execute(ctx, plan, comm, binding, &stats);
  EXPECT_EQ(status.ok(), !fails);
  EXPECT_EQ(calls, fails ? 1 : comm.size());
  if (fails) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
    EXPECT_NE(status.message().find(absl::StrCat("rank ", comm.rank(), " step 0 (attend")),
              absl::string_view::npos)
        << status;
  }
}

inline void CheckAgreement(Communicator comm) {
  const ExchangeCase made =
      ExchangeCaseMaker(3).Make(comm.size(), 4, 4 * comm.size(), CaseLayout::kZigzag, CaseMask::kCausal);
  const ExchangePlan plan = BuildKvRing(made.problem, Pass::kForward);
  EXPECT_TRUE(AgreeOnPlan(plan, comm).ok());
  if (comm.size() == 1) return;
  for (int different = 0; different < comm.size(); ++different) {
    ExchangePlan mine = plan;
    if (comm.rank() == different) mine.ranks[0].steps[0].rows.end -= 1;
    const absl::Status status = AgreeOnPlan(mine, comm);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_NE(status.message().find("expected the same plan"), absl::string_view::npos) << status;
  }
}

}  // namespace annulus::testing
