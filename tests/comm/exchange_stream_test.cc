// What a rank enqueues for a plan, and where slots lie in the memory of peers: on the CPU, where a transfer
// is complete when its call returns. So a round that is run with every rank blocking in it is the strictest
// lane.

#include "../../comm/exchange/stream_transport.h"
#include "comm/exchange_execute_checks.h"
#include "comm/measured_timeline.h"

namespace annulus {
namespace {

using testing::CaseLayout;
using testing::CaseMask;
using testing::ExchangeCase;
using testing::ExchangeCaseMaker;

using testing::kPasses;

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
      Start(run, s, StreamOf(lane));
      const Step& step = run.step(s);
      const int tag = static_cast<int>(lane);  // matched by order, as NCCL does
      for (const TensorRef& field : run.SlotOf(s).fields) {
        const TensorRef rows = run.RowsOf(s, field);
        const bool sends = step.kind == StepKind::kSend;
        requests.push_back(sends ? cp_.Send(rows, step.peer, tag).value()
                                 : cp_.Receive(rows, step.peer, tag).value());
      }
    }
    for (Request& request : requests) ANNULUS_RETURN_IF_ERROR(request.Wait());
    for (const int s : round.steps) Complete(run, s, lane);
    return absl::OkStatus();
  }
};

class Streams : public ::testing::TestWithParam<int> {};

TEST_P(Streams, RunPlansToTheRightResult) {
  testing::OnLoopback(GetParam(), [](Communicator comm) {
    BlockingTransport transport(comm);
    Context ctx{Device{}};
    uint64_t seed = 17;
    for (const PlanChoice& choice : testing::ManyChoices(comm.size(), 4)) {
      for (const Pass pass : kPasses) {
        const ExchangeCase made = testing::CaseFor(choice, comm.size(), ++seed);
        const ExchangePlan plan = BuildPlan(made.problem, pass, choice).value();
        testing::ToyRank rank(made, plan, comm.rank());
        ExchangeStats stats;
        const absl::Status status = testing::RunToy(ctx, transport, plan, &rank, &stats);
        ASSERT_TRUE(status.ok()) << status;
        EXPECT_EQ(rank.Compare(), "") << made.name << "\n" << ToString(plan);
        EXPECT_EQ(stats.bytes_sent, testing::ToyBytesSent(plan, comm.rank()));
      }
    }
  });
}

TEST_P(Streams, RecordEveryStep) {
  testing::OnLoopback(GetParam(), [](Communicator comm) {
    BlockingTransport transport(comm);
    Context ctx{Device{}};
    StepClock clock(ctx.device);
    uint64_t seed = 29;
    for (const PlanChoice& choice : testing::ManyChoices(comm.size(), 4)) {
      for (const Pass pass : kPasses) {
        const ExchangeCase made = testing::CaseFor(choice, comm.size(), ++seed);
        const ExchangePlan plan = BuildPlan(made.problem, pass, choice).value();
        testing::ToyRank rank(made, plan, comm.rank());
        ASSERT_TRUE(clock.Start(ctx, comm).ok());
        ExchangeStats stats{.clock = &clock};
        ASSERT_TRUE(testing::RunToy(ctx, transport, plan, &rank, &stats).ok());
        const absl::StatusOr<Simulation> measured = clock.Take(plan, comm);
        ASSERT_TRUE(measured.ok()) << measured.status();
        testing::CheckMeasured(plan, *measured);
        EXPECT_EQ(measured->bytes_sent[static_cast<size_t>(comm.rank())], stats.bytes_sent);
      }
    }
  });
}

TEST_P(Streams, SurviveAFailingStep) {
  testing::OnLoopback(GetParam(), [](Communicator comm) {
    BlockingTransport transport(comm);
    testing::CheckFailingStep(comm, transport);
  });
}

TEST(StreamsOfThreeRanks, MoveAllFields) {
  testing::OnLoopback(3, [](Communicator comm) {
    BlockingTransport transport(comm);
    testing::MixedFields(comm).Run(transport);
  });
}

INSTANTIATE_TEST_SUITE_P(Ranks, Streams, ::testing::Range(1, 9));

// Random plans of up to nine ranks.
struct Made {
  ExchangeCase made;
  ExchangePlan plan;
};
std::vector<Made> RandomPlans(uint64_t first_seed) {
  std::vector<Made> plans;
  for (int ranks = 1; ranks < 10; ++ranks) {
    for (const PlanChoice& choice : testing::ManyChoices(ranks, 4)) {
      for (const Pass pass : kPasses) {
        ExchangeCase made = testing::CaseFor(choice, ranks, first_seed + plans.size());
        ExchangePlan plan = BuildPlan(made.problem, pass, choice).value();
        plans.push_back({std::move(made), std::move(plan)});
      }
    }
  }
  return plans;
}

// Fields whose sizes differ by payload, group, width and field.
SlotSource UnlikeFields(const ExchangePlan& plan) {
  return {.home = {}, .fields = [&plan](const SlotSpec& spec) -> std::vector<SlotField> {
            const int64_t heads = static_cast<int64_t>(testing::HeadsOf(plan, spec).size());
            const int64_t payload = static_cast<int64_t>(spec.payload);
            std::vector<SlotField> fields = {{.dtype = DType::kF32, .row = {heads, 3 + payload}}};
            if (IsResult(spec.payload)) fields.push_back({.dtype = DType::kF64, .row = {heads}});
            if (spec.width == Width::kCompute) fields[0].dtype = DType::kBF16;
            if (spec.payload == Payload::kKv) fields.push_back({.dtype = DType::kU8, .row = {1}});
            return fields;
          }};
}

// Whoever sends finds each field of the receiver's slot where the receiver has it; fields do not overlap.
TEST(StreamPlan, PoolsAreTheSameForAll) {
  for (const Made& each : RandomPlans(3)) {
    const ExchangePlan& plan = each.plan;
    const SlotSource source = UnlikeFields(plan);
    std::vector<StreamPlan> ranks;
    for (int r = 0; r < plan.problem.ranks; ++r) ranks.emplace_back(plan, r);
    std::map<std::pair<int, size_t>, int64_t> arrivals;  // by message and field: where its first byte lies
    int64_t largest = 0;
    for (int r = 0; r < plan.problem.ranks; ++r) {
      const StreamPlan& mine = ranks[static_cast<size_t>(r)];
      const PoolLayout layout(mine, source);
      const auto& pool = mine.pools[static_cast<size_t>(r)];
      int64_t end = 0;
      for (size_t place = 0; place < pool.size(); ++place) {
        const SlotSpec& spec = mine.rank.slots[static_cast<size_t>(pool[place].slot)];
        const std::vector<SlotField> fields = source.fields(spec);
        ASSERT_EQ(layout.FieldsOf(pool[place].kind).size(), fields.size());
        for (size_t f = 0; f < fields.size(); ++f) {
          const int64_t row_bytes = fields[f].row.elements() * SizeOf(fields[f].dtype);
          const int64_t begin = layout.OffsetOf(r, place, f);
          EXPECT_EQ(begin, end);
          EXPECT_EQ(begin % kAlignmentBytes, 0);
          end = begin + SlotRows(plan, spec) * row_bytes;
          end += (kAlignmentBytes - end % kAlignmentBytes) % kAlignmentBytes;
          for (const Step& step : mine.rank.steps) {
            if (step.kind != StepKind::kReceive || step.slot != pool[place].slot) continue;
            EXPECT_FALSE(spec.home);
            EXPECT_LT(step.message, mine.messages);
            arrivals[{step.message, f}] = begin + RowInSlot(plan, spec, step.rows) * row_bytes;
          }
        }
      }
      largest = std::max(largest, end);
    }
    size_t sent = 0;
    for (const StreamPlan& mine : ranks) {
      const PoolLayout layout(mine, source);
      EXPECT_EQ(layout.bytes(), largest);
      EXPECT_EQ(mine.lanes, ranks[0].lanes);
      for (size_t s = 0; s < mine.rank.steps.size(); ++s) {
        const Step& step = mine.rank.steps[s];
        if (step.kind != StepKind::kSend) continue;
        const StreamPlan::PeerRows& target = mine.peer_rows[s];
        const size_t kind = mine.pools[static_cast<size_t>(step.peer)][target.place].kind;
        const std::vector<SlotField>& fields = layout.FieldsOf(kind);
        for (size_t f = 0; f < fields.size(); ++f, ++sent) {
          const int64_t row_bytes = fields[f].row.elements() * SizeOf(fields[f].dtype);
          EXPECT_EQ(layout.OffsetOf(step.peer, target.place, f) + target.begin * row_bytes,
                    arrivals.at({step.message, f}));
        }
      }
    }
    EXPECT_EQ(sent, arrivals.size());
  }
}

// Computing waits for every transfer that it comes after, once; and what a transfer waits for is marked.
TEST(StreamPlan, WaitsForAllThatItComesAfter) {
  for (const Made& each : RandomPlans(7)) {
    for (int r = 0; r < each.plan.problem.ranks; ++r) {
      const StreamPlan mine(each.plan, r);
      const std::vector<Step>& steps = mine.rank.steps;
      std::vector<size_t> waited(steps.size(), steps.size());  // by transfer: who waits
      std::vector<bool> across(steps.size());                  // by step: whether another lane waits
      for (size_t s = 0; s < steps.size(); ++s) {
        for (const int transfer : mine.compute_waits[s]) {
          const size_t t = static_cast<size_t>(transfer);
          EXPECT_TRUE(IsTransfer(steps[t].kind));
          EXPECT_EQ(waited[t], steps.size());
          waited[t] = s;
        }
        for (const int before : steps[s].after) {
          const size_t b = static_cast<size_t>(before);
          const bool computes = IsCompute(steps[s].kind), transfer_before = IsTransfer(steps[b].kind);
          EXPECT_TRUE(!computes || !transfer_before || waited[b] <= s) << "step " << s;
          EXPECT_TRUE((computes && !transfer_before) || mine.is_awaited[b]) << "step " << s;
          across[b] = across[b] || !computes || transfer_before;
        }
      }
      EXPECT_EQ(mine.needed_by, waited);
      EXPECT_EQ(mine.is_awaited, across);
    }
  }
}

// What a group makes room for before the first batch of documents, by the plan without any, is enough for all
// of them: but for balanced plans, which share out the work of each batch anew, and rings of blocks in parts.
TEST(PoolLayout, IsNoLargerForDocuments) {
  constexpr int64_t kSpareFlags = 4;  // of the copy engine
  const SlotSource source{.home = {}, .fields = [](const SlotSpec& slot) -> std::vector<SlotField> {
                            return {{.dtype = DType::kF32, .row = {slot.width == Width::kCompute ? 1 : 2}}};
                          }};
  int fewer = 0;
  for (const int ranks : {2, 3, 4, 8}) {
    for (const PlanChoice& choice : testing::ManyChoices(ranks, 4)) {
      const auto plan_of = [&](uint64_t seed, CaseMask mask, Pass pass) {
        const ExchangeCase made =
            ExchangeCaseMaker(seed).Make(ranks, 16, 16 * ranks, CaseLayout::kZigzag, mask,
                                         {.parts = ChunkParts(choice), .heads = 4, .kv_heads = 2});
        return StreamPlan(BuildPlan(made.problem, pass, choice).value(), 0);
      };
      for (const Pass pass : kPasses) {
        const StreamPlan whole = plan_of(1, CaseMask::kCausal, pass);
        const int64_t bytes = PoolLayout(whole, source).bytes();
        for (uint64_t seed = 2; seed < 6; ++seed) {
          const StreamPlan documents = plan_of(seed, CaseMask::kDocuments, pass);
          EXPECT_LE(documents.messages, kSpareFlags * whole.messages) << documents.name;
          fewer += documents.messages < whole.messages ? 1 : 0;
          if (choice.kind == PlanKind::kBalanced || choice.parts > 1) continue;
          EXPECT_LE(PoolLayout(documents, source).bytes(), bytes) << documents.name << " on " << ranks;
        }
      }
    }
  }
  EXPECT_GT(fewer, 0);
}

TEST(StreamPlan, IsKeptAndToldApart) {
  const auto problem = [](CaseMask mask) {
    return ExchangeCaseMaker(1).Make(3, 4, 12, CaseLayout::kZigzag, mask).problem;
  };
  const ExchangeProblem a = problem(CaseMask::kCausal), b = problem(CaseMask::kFull);
  const PlanChoice ring, higher{.direction = RingDirection::kTowardHigher}, buffers{.buffers = 3},
      token{.kind = PlanKind::kTokenRing};
  std::vector<ExchangePlan> plans;
  for (const PlanChoice& choice : {ring, higher, buffers, token}) {
    for (const ExchangeProblem& each : {a, b}) {
      for (const Pass pass : kPasses) plans.push_back(BuildPlan(each, pass, choice).value());
    }
  }
  // What does not show in this rank's steps: how much memory another rank's messages need, and of which
  // problem all other steps are.
  plans.push_back(plans[0]);
  plans.back().ranks[0].slots.back().width = Width::kCompute;
  plans.push_back(plans[0]);
  plans.back().problem.pairs.back() += 1;
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
    known.Of(BuildPlan(other, Pass::kForward, {}).value(), 1);
    EXPECT_EQ(&known.Of(plans[0], 1), first[0]);
  }
}

}  // namespace
}  // namespace annulus
