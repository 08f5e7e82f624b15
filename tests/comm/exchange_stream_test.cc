// What a rank enqueues for a plan, and where slots lie in the memory of peers: on the CPU, where a transfer
// is complete when its call returns. So a round that is run with every rank blocking in it is the strictest
// lane.

#include "../../comm/exchange/stream_transport.h"
#include "comm/communicator_checks.h"
#include "comm/exchange_cases.h"

namespace annulus {
namespace {

using testing::CaseLayout;
using testing::CaseMask;
using testing::ExchangeCase;
using testing::ExchangeCaseMaker;

constexpr Pass kPasses[] = {Pass::kForward, Pass::kBackward};

class BlockingTransport : public StreamTransport {
 public:
  explicit BlockingTransport(Communicator cp) : StreamTransport(std::move(cp), Device{}) {}
  TransportKind kind() const override { return TransportKind::kHost; }

 private:
  absl::Status Begin(const Run&) override { return absl::OkStatus(); }
  std::string NameOf(size_t lane) const override { return absl::StrCat("lane ", lane); }

  absl::Status Transfer(const Run& run, const Launch& round) override {
    const size_t lane = static_cast<size_t>(round.lane);
    std::vector<Request> requests;
    for (const int s : round.steps) {
      Await(run, s, StreamOf(lane));
      const Step& step = run.step(s);
      const int tag = static_cast<int>(lane);  // matched by order, as NCCL does
      const bool sends = step.kind == StepKind::kSend;
      requests.push_back(sends ? cp_.Send(run.RowsOf(s), step.peer, tag).value()
                               : cp_.Receive(run.RowsOf(s), step.peer, tag).value());
    }
    for (Request& request : requests) ANNULUS_RETURN_IF_ERROR(request.Wait());
    for (const int s : round.steps) Complete(run, s, lane);
    return absl::OkStatus();
  }
};

absl::Status AddRows(ConstTensorRef from, TensorRef to) {
  for (int64_t i = 0; i < to.elements(); ++i) to.data<int64_t>()[i] += from.data<int64_t>()[i];
  return absl::OkStatus();
}

class Streams : public ::testing::TestWithParam<int> {};

TEST_P(Streams, RunPlansToTheRightResult) {
  testing::OnLoopback(GetParam(), [](Communicator comm) {
    BlockingTransport transport(comm);
    Context ctx{Device{}};
    for (uint64_t seed = 0; seed < 20; ++seed) {
      const ExchangeCase made = ExchangeCaseMaker(seed).MakeRandom(comm.size());
      for (const Pass pass : kPasses) {
        const ExchangePlan plan = BuildKvRing(made.problem, pass);
        testing::ToyRank rank(made, plan, comm.rank());
        const ExchangeBinding binding{.slots = rank.refs(),
                                      .attend =
                                          [&](const Step& step) {
                                            rank.Attend(step);
                                            return absl::OkStatus();
                                          },
                                      .reduce = AddRows};
        ExchangeStats stats;
        const absl::Status status = transport.Execute(ctx, plan, binding, &stats);
        ASSERT_TRUE(status.ok()) << status;
        EXPECT_EQ(rank.Compare(), "") << made.name << "\n" << ToString(plan);
        EXPECT_EQ(stats.bytes_sent, BytesSent(plan, comm.rank(), 16, 16));
      }
    }
  });
}

TEST_P(Streams, SurviveAFailingAttend) {
  testing::OnLoopback(GetParam(), [](Communicator comm) {
    const ExchangePlan plan =
        BuildKvRing(ExchangeCaseMaker(3)
                        .Make(comm.size(), 4, 4 * comm.size(), CaseLayout::kContiguous, CaseMask::kFull)
                        .problem,
                    Pass::kBackward);
    std::vector<std::vector<int64_t>> memory(plan.ranks[static_cast<size_t>(comm.rank())].slots.size(),
                                             std::vector<int64_t>(8));
    ExchangeBinding binding;
    for (auto& slot : memory) binding.slots.emplace_back(slot.data(), DType::kI64, Device{}, Shape{4, 2});
    const bool fails = comm.rank() == comm.size() - 1;
    int calls = 0;
    binding.attend = [&](const Step&) {
      ++calls;
      return fails ? absl::InternalError("broken kernel") : absl::OkStatus();
    };
    binding.reduce = AddRows;
    Context ctx{Device{}};
    ExchangeStats stats;
    const absl::Status status = BlockingTransport(comm).Execute(ctx, plan, binding, &stats);
    EXPECT_EQ(status.ok(), !fails);
    EXPECT_EQ(calls, fails ? 1 : comm.size());
    if (!fails) return;
    EXPECT_NE(status.message().find(absl::StrCat("rank ", comm.rank(), " step 0 (attend")),
              absl::string_view::npos)
        << status;
  });
}

INSTANTIATE_TEST_SUITE_P(Ranks, Streams, ::testing::Range(1, 9));

// Whoever sends finds the receiver's slot where the receiver has it, and slots do not overlap.
TEST(StreamPlan, PoolsAreTheSameForAll) {
  constexpr SlotBytes kBytes{.kv = 100, .grad = 1000};
  for (uint64_t seed = 0; seed < 60; ++seed) {
    ExchangeCaseMaker maker(seed);
    const ExchangeCase made = maker.MakeRandom(static_cast<int>(1 + maker.Below(10)));
    for (const Pass pass : kPasses) {
      const ExchangePlan plan = BuildKvRing(made.problem, pass);
      std::vector<StreamPlan> ranks;
      for (int r = 0; r < made.problem.ranks; ++r) ranks.emplace_back(plan, r);
      std::map<int, int64_t> offsets;  // by message, at the receiver
      int64_t largest = 0;
      for (const StreamPlan& mine : ranks) {
        std::vector<std::pair<int64_t, int64_t>> taken;
        for (size_t slot = 0; slot < mine.pool.size(); ++slot) {
          if (!mine.pool[slot].has_value()) continue;
          const int64_t begin = OffsetOf(*mine.pool[slot], kBytes);
          const bool kv = mine.rank.slots[slot].payload == Payload::kKv;
          taken.emplace_back(begin, begin + (kv ? kBytes.kv : kBytes.grad));
        }
        std::sort(taken.begin(), taken.end());
        int64_t end = 0;
        for (const auto& [from, to] : taken) {
          EXPECT_EQ(from, end);  // no gap, no overlap
          end = to;
        }
        largest = std::max(largest, end);
        for (const Step& step : mine.rank.steps) {
          if (step.kind != StepKind::kReceive) continue;
          EXPECT_FALSE(mine.rank.slots[static_cast<size_t>(step.slot)].home);
          offsets[step.message] = OffsetOf(*mine.pool[static_cast<size_t>(step.slot)], kBytes);
          EXPECT_LT(step.message, mine.messages);
        }
      }
      for (const StreamPlan& mine : ranks) {
        EXPECT_EQ(mine.PoolBytes(kBytes), largest);
        for (size_t s = 0; s < mine.rank.steps.size(); ++s) {
          if (mine.rank.steps[s].kind != StepKind::kSend) continue;
          EXPECT_EQ(OffsetOf(mine.peer_place[s], kBytes), offsets.at(mine.rank.steps[s].message));
        }
      }
    }
  }
}

// Computing waits for every transfer that it comes after, once; and what a transfer waits for is marked.
TEST(StreamPlan, WaitsForAllThatItComesAfter) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    ExchangeCaseMaker maker(seed + 7);
    const ExchangeCase made = maker.MakeRandom(static_cast<int>(1 + maker.Below(10)));
    const ExchangePlan plan = BuildKvRing(made.problem, Pass::kBackward);
    for (int r = 0; r < made.problem.ranks; ++r) {
      const StreamPlan mine(plan, r);
      std::vector<int> waited(mine.rank.steps.size());
      for (size_t s = 0; s < mine.rank.steps.size(); ++s) {
        for (const int transfer : mine.compute_waits[s]) {
          EXPECT_GE(mine.rank.steps[static_cast<size_t>(transfer)].peer, 0);
          EXPECT_EQ(++waited[static_cast<size_t>(transfer)], 1);
        }
        for (const int before : mine.rank.steps[s].after) {
          const size_t b = static_cast<size_t>(before);
          const bool computes = mine.rank.steps[s].peer < 0, transfer_before = mine.rank.steps[b].peer >= 0;
          EXPECT_TRUE(!computes || !transfer_before || waited[b] == 1) << "step " << s;
          EXPECT_TRUE(computes || transfer_before || mine.is_awaited[b]) << "step " << s;
        }
      }
    }
  }
}

TEST(StreamPlan, IsKeptAndToldApart) {
  const ExchangeProblem a =
      ExchangeCaseMaker(1).Make(3, 4, 12, CaseLayout::kZigzag, CaseMask::kCausal).problem;
  const ExchangeProblem b = ExchangeCaseMaker(1).Make(3, 4, 12, CaseLayout::kZigzag, CaseMask::kFull).problem;
  const std::vector<ExchangePlan> plans = {BuildKvRing(a, Pass::kForward), BuildKvRing(a, Pass::kBackward),
                                           BuildKvRing(b, Pass::kForward),
                                           BuildKvRing(a, Pass::kForward, RingDirection::kTowardHigher),
                                           BuildKvRing(b, Pass::kForward, RingDirection::kTowardHigher)};
  StreamPlans known;
  std::vector<const StreamPlan*> first;
  for (const ExchangePlan& plan : plans) first.push_back(&known.Of(plan, 1));
  for (size_t i = 0; i < plans.size(); ++i) {
    const ExchangePlan copy = plans[i];
    EXPECT_EQ(&known.Of(copy, 1), first[i]);
    for (size_t j = 0; j < plans.size(); ++j) EXPECT_EQ(first[i]->IsOf(plans[j], 1), i == j) << i << " " << j;
  }
  // Those that are used stay, others make room.
  for (int ranks = 2; ranks < 100; ++ranks) {
    const ExchangeProblem other =
        ExchangeCaseMaker(1).Make(ranks, 2, 2 * ranks, CaseLayout::kContiguous, CaseMask::kFull).problem;
    known.Of(BuildKvRing(other, Pass::kForward), 1);
    EXPECT_EQ(&known.Of(plans[0], 1), first[0]);
  }
}

}  // namespace
}  // namespace annulus
