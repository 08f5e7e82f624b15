// ranks: 1 2 3 4
// Plans run by every transport that this machine offers, compared exactly with the direct computation. Ranks
// may share a GPU.

#include "annulus/comm/exchange_bench.h"
#include "gpu/exchange_run.h"

namespace annulus::testing {
namespace {

// One execution, its result and its bytes.
void RunAndCompare(GpuRank& gpu, ExchangeTransport& transport, const ExchangeCase& made,
                   const ExchangePlan& plan, int64_t number) {
  HomeMemory home(gpu);
  home.Fit(plan);
  Execution execution(gpu, made, plan, number);
  ExchangeStats stats;
  const absl::Status status = execution.Run(transport, home, &stats);
  ASSERT_TRUE(status.ok()) << status;
  gpu.ctx.lane.Synchronize();
  EXPECT_EQ(execution.Compare(), "") << made.name << "\n" << ToString(plan);
  EXPECT_EQ(stats.bytes_sent, ToyBytesSent(plan, gpu.cp.rank()));
}

struct PlannedCase {
  ExchangeCase made;
  ExchangePlan plan;
};

// Every choice and pass, each on a random layout and mask.
std::deque<PlannedCase> AllPlans(int ranks, uint64_t seed) {
  std::deque<PlannedCase> planned;
  for (const PlanChoice& choice : ManyChoices(ranks, 4)) {
    for (const Pass pass : kPasses) {
      ExchangeCase made = CaseFor(choice, ranks, ++seed);
      ExchangePlan plan = BuildPlan(made.problem, pass, choice).value();
      planned.push_back({std::move(made), std::move(plan)});
    }
  }
  return planned;
}

TEST(GpuExchange, ComputesEveryPairOnce) {
  OnTransports([](GpuRank& gpu, ExchangeTransport& transport) {
    for (const uint64_t seed : {0, 1000}) {
      for (const PlannedCase& each : AllPlans(gpu.cp.size(), seed)) {
        ASSERT_TRUE(AgreeOnPlan(each.plan, gpu.cp).ok());
        RunAndCompare(gpu, transport, each.made, each.plan, 0);
      }
    }
    EXPECT_TRUE(transport.Health().ok());
  });
}

// Executions that follow each other without the host waiting, with other values each time, each compared.
// Computing steps of execution i are late at random by up to delay_us(i); hosts pause at random.
void RunInARow(GpuRank& gpu, ExchangeTransport& transport, const std::vector<const PlannedCase*>& sequence,
               const std::function<uint64_t(size_t)>& delay_us) {
  HomeMemory home(gpu);
  std::deque<Execution> executions;
  for (size_t i = 0; i < sequence.size(); ++i) {
    home.Fit(sequence[i]->plan);
    executions.emplace_back(gpu, sequence[i]->made, sequence[i]->plan, static_cast<int64_t>(i));
    executions.back().set_delay_us(delay_us(i));
  }
  const RandomStream random(1, absl::StrCat("pauses of rank ", gpu.cp.rank()));
  ExchangeStats stats;
  int64_t bytes = 0;
  for (size_t i = 0; i < sequence.size(); ++i) {
    if (random.Below(2 * i, 8) == 0) SleepMicroseconds(static_cast<int64_t>(random.Below(2 * i + 1, 5000)));
    const absl::Status status = executions[i].Run(transport, home, &stats);
    ASSERT_TRUE(status.ok()) << status;
    bytes += ToyBytesSent(sequence[i]->plan, gpu.cp.rank());
  }
  gpu.ctx.lane.Synchronize();
  for (size_t i = 0; i < sequence.size(); ++i) {
    EXPECT_EQ(executions[i].Compare(), "")
        << "execution " << i << ": " << sequence[i]->plan.name << ", " << sequence[i]->made.name;
  }
  EXPECT_EQ(stats.bytes_sent, bytes);
}

// While ranks are late at random, no message may be taken for that of another execution, nor memory be used
// that the one before still needs.
TEST(GpuExchange, KeepsExecutionsApart) {
  OnTransports([](GpuRank& gpu, ExchangeTransport& transport) {
    const std::deque<PlannedCase> planned = AllPlans(gpu.cp.size(), 77);
    const RandomStream random(1, "the same on all ranks");
    std::vector<const PlannedCase*> sequence;
    for (uint64_t i = 0; i < 200; ++i) sequence.push_back(&planned[random.Below(i, planned.size())]);
    RunInARow(gpu, transport, sequence, [](size_t i) { return i % 3 == 0 ? 300 : 0; });
  });
}

// Every rank sees its own block, and one rank that of rank 0, too.
ExchangeCase OneSeesBlockZero(int ranks, int viewer) {
  ExchangeCase made =
      ExchangeCaseMaker(1).Make(ranks, 8, 8 * ranks, CaseLayout::kContiguous, CaseMask::kFull);
  made.name = absl::StrCat("rank ", viewer, " of ", ranks, " sees block 0");
  for (int64_t q = 0; q < made.rows(); ++q) {
    for (int64_t k = 0; k < made.rows(); ++k) {
      const int64_t q_rank = q / 8, k_rank = k / 8;
      const bool allowed = q_rank == k_rank || (q_rank == viewer && k_rank == 0);
      made.allowed[static_cast<size_t>(q * made.rows() + k)] = allowed;
      const size_t pair = static_cast<size_t>(q_rank * ranks + k_rank);
      if (!allowed) made.problem.keys[pair] = {0, 0}, made.problem.pairs[pair] = 0;
    }
  }
  return made;
}

// Whether both have a message of one number and sender, to different receivers.
bool HaveAMessageInCommon(const ExchangePlan& a, const ExchangePlan& b) {
  for (size_t r = 0; r < a.ranks.size(); ++r) {
    for (const Step& x : a.ranks[r].steps) {
      for (const Step& y : b.ranks[r].steps) {
        const bool both_send = x.kind == StepKind::kSend && y.kind == StepKind::kSend;
        if (both_send && x.message == y.message && x.peer != y.peer) return true;
      }
    }
  }
  return false;
}

// Rank 1 needs nothing of every second execution, so it is ready for the next while the last rank, which is
// slow, still reads what it got. Rank 0 must not take the one's readiness for the other's.
TEST(GpuExchange, AFastReceiverDoesNotSpeakForASlowOne) {
  OnTransports([](GpuRank& gpu, ExchangeTransport& transport) {
    const int ranks = gpu.cp.size(), last = ranks - 1;
    const ExchangeCase slow = OneSeesBlockZero(ranks, last),
                       quick = OneSeesBlockZero(ranks, std::min(1, last));
    std::vector<const PlannedCase*> sequence;
    std::deque<PlannedCase> planned;
    for (const Pass pass : kPasses) {
      for (const ExchangeCase* made : {&slow, &quick})
        planned.push_back({*made, BuildPlan(made->problem, pass, {.kind = PlanKind::kDirectCast}).value()});
      const size_t first = planned.size() - 2;
      for (int i = 0; i < 25; ++i) sequence.insert(sequence.end(), {&planned[first], &planned[first + 1]});
    }
    EXPECT_EQ(HaveAMessageInCommon(planned[0].plan, planned[1].plan), ranks > 2);
    RunInARow(gpu, transport, sequence, [&](size_t) { return gpu.cp.rank() == last ? 1000 : 0; });
  });
}

TEST(GpuExchange, TakesMoreMemoryForLargerBlocks) {
  OnTransports([](GpuRank& gpu, ExchangeTransport& transport) {
    const int ranks = gpu.cp.size();
    for (const int64_t rows : {2, 64, 8, 256, 4}) {
      for (const PlanChoice& choice :
           {PlanChoice(), PlanChoice{.kind = PlanKind::kTokenRing, .head_split = ranks}}) {
        const ExchangeCase made =
            ExchangeCaseMaker(2).Make(ranks, rows, rows * ranks, CaseLayout::kStriped, CaseMask::kDocuments,
                                      {.heads = 4, .kv_heads = 2});
        for (const Pass pass : kPasses) {
          const ExchangePlan plan = BuildPlan(made.problem, pass, choice).value();
          RunAndCompare(gpu, transport, made, plan, rows);
        }
      }
    }
  });
}

// Reserved is all that plans of the same choice take, whatever documents leave of their work: Slots takes no
// more. Rows are as large as a page of memory.
TEST(GpuExchange, TakesNoMoreThanWasReserved) {
  OnTransports([](GpuRank& gpu, ExchangeTransport& transport) {
    if (transport.kind() != TransportKind::kCopyEngine) return;  // others have slots in the arena
    const int ranks = gpu.cp.size();
    const Tensor home(gpu.ctx.device, DType::kU8, {4, int64_t{2} << 20});
    const SlotSource source{.home = [&](Payload) { return SlotMemory{.fields = {home.ref()}}; },
                            .fields = [&](const SlotSpec&) -> std::vector<SlotField> {
                              return {{.dtype = DType::kU8, .row = {home.ref().dim(1)}}};
                            }};
    const int64_t before = transport.device_bytes();
    for (const PlanKind kind : {PlanKind::kDirectCast, PlanKind::kKvRing, PlanKind::kTokenRing}) {
      const auto plan_of = [&](uint64_t seed, CaseMask mask) {
        const ExchangeProblem problem =
            ExchangeCaseMaker(seed).Make(ranks, 4, 4 * ranks, CaseLayout::kZigzag, mask).problem;
        return BuildPlan(problem, Pass::kBackward, {.kind = kind}).value();
      };
      ASSERT_TRUE(transport.Reserve(plan_of(1, CaseMask::kCausal), source).ok());
      const int64_t reserved = transport.device_bytes();
      EXPECT_EQ(reserved > before, ranks > 1);
      for (uint64_t seed = 2; seed < 8; ++seed) {
        const ArenaScope scope(gpu.ctx.scratch);
        ASSERT_TRUE(transport.Slots(gpu.ctx, plan_of(seed, CaseMask::kDocuments), source).ok());
        EXPECT_EQ(transport.device_bytes(), reserved) << Name(kind) << ", documents " << seed;
      }
    }
  });
}

// Blocks of 16 MiB, which take the pool of memory far beyond one page: all their rows get to all ranks.
TEST(GpuExchange, MovesLargeBlocks) {
  OnTransports([](GpuRank& gpu, ExchangeTransport& transport) {
    const int64_t rows = int64_t{1} << 18, elements = 8;
    ExchangeProblem problem =
        ExchangeCaseMaker(1)
            .Make(gpu.cp.size(), 2, 2 * gpu.cp.size(), CaseLayout::kContiguous, CaseMask::kFull)
            .problem;
    problem.block_rows = rows;
    for (Chunk& chunk : problem.chunks) chunk.rows = {0, rows};
    for (RowRange& keys : problem.keys) keys = {0, rows};
    const ExchangePlan plan = BuildPlan(problem, Pass::kForward, {}).value();
    const Tensor kv(gpu.ctx.device, DType::kI64, {rows, elements});
    const Tensor other(gpu.ctx.device, DType::kU8, {rows});  // queries and outputs, which nobody looks at
    const SlotSource source{.home =
                                [&](Payload payload) {
                                  const bool keys = payload == Payload::kKv;
                                  return SlotMemory{.fields = {keys ? kv.ref() : other.ref()}};
                                },
                            .fields = [&](const SlotSpec&) -> std::vector<SlotField> {
                              return {{.dtype = DType::kI64, .row = {elements}}};
                            }};
    const auto value = [&](int64_t owner, int64_t i, int64_t execution) {
      return owner * 1000 + execution * 10 + i % 7;
    };
    std::vector<int64_t> block(static_cast<size_t>(rows * elements)), got = block;
    for (int64_t execution = 0; execution < 3; ++execution) {
      for (int64_t i = 0; i < rows * elements; ++i)
        block[static_cast<size_t>(i)] = value(gpu.cp.rank(), i, execution);
      Upload(gpu.ctx, block.data(), kv.ref().bytes(), kv.ref());
      const ArenaScope scope(gpu.ctx.scratch);
      ExchangeBinding binding{.slots = transport.Slots(gpu.ctx, plan, source).value()};
      int attended = 0;
      binding.compute = [&](const Step& step) {
        const SlotMemory& slot = binding.slots[static_cast<size_t>(step.attend.kv_slot)];
        Download(gpu.ctx, slot.fields[0], got.data());
        int64_t wrong = 0;
        for (int64_t i = 0; i < rows * elements; ++i)
          wrong += got[static_cast<size_t>(i)] != value(step.attend.kv_rows[0].block, i, execution) ? 1 : 0;
        EXPECT_EQ(wrong, 0) << "block " << step.attend.kv_rows[0].block << ", execution " << execution;
        ++attended;
        return absl::OkStatus();
      };
      ExchangeStats stats;
      ASSERT_TRUE(transport.Execute(gpu.ctx, plan, binding, &stats).ok());
      gpu.ctx.lane.Synchronize();
      EXPECT_EQ(attended, gpu.cp.size());
      EXPECT_EQ(stats.bytes_sent, (gpu.cp.size() - 1) * kv.ref().bytes());
    }
  });
}

PlannedCase FullMask(int ranks, Pass pass, PlanKind kind = PlanKind::kKvRing) {
  const PlanChoice choice{.kind = kind};
  ExchangeCase made = ExchangeCaseMaker(1).Make(ranks, 4, 4 * ranks, CaseLayout::kContiguous, CaseMask::kFull,
                                                {.parts = ChunkParts(choice)});
  ExchangePlan plan = BuildPlan(made.problem, pass, choice).value();
  return {std::move(made), std::move(plan)};
}

// All wait for rank 0, directly or by others that do.
TEST(GpuExchange, CountsWaitingForALateRank) {
  OnTransports([](GpuRank& gpu, ExchangeTransport& transport) {
    for (const PlanKind kind : {PlanKind::kKvRing, PlanKind::kTokenRing}) {
      const PlannedCase full = FullMask(gpu.cp.size(), Pass::kForward, kind);
      RunAndCompare(gpu, transport, full.made, full.plan, 0);
      gpu.ctx.waits.TakeSeconds(WaitKind::kExchange);
      ASSERT_TRUE(gpu.cp.Barrier().ok());
      constexpr int64_t kLateUs = 200'000;
      if (gpu.cp.rank() == 0) SleepMicroseconds(kLateUs);
      RunAndCompare(gpu, transport, full.made, full.plan, 1);
      const double waited = gpu.ctx.waits.TakeSeconds(WaitKind::kExchange);
      if (gpu.cp.rank() == 0) continue;
      EXPECT_GT(waited, 0.5e-6 * kLateUs);
      EXPECT_LT(waited, 5);
    }
  });
}

TEST(GpuExchange, SurvivesAFailingStep) {
  OnTransports([](GpuRank& gpu, ExchangeTransport& transport) {
    const PlannedCase full = FullMask(gpu.cp.size(), Pass::kBackward);
    const std::vector<Step>& steps = full.plan.ranks[static_cast<size_t>(gpu.cp.rank())].steps;
    const auto computes = [](const Step& step) { return IsCompute(step.kind); };
    const auto first = std::find_if(steps.begin(), steps.end(), computes) - steps.begin();
    const bool fails = gpu.cp.rank() == gpu.cp.size() - 1;
    const ToyRank toy(full.made, full.plan, gpu.cp.rank());
    HomeMemory home(gpu);
    home.Fit(full.plan);
    {
      const ArenaScope scope(gpu.ctx.scratch);
      const SlotSource source{.home = [&](Payload payload) { return home.Of(toy, payload); },
                              .fields = toy.source().fields};
      int64_t calls = 0;
      const ExchangeBinding binding{.slots = transport.Slots(gpu.ctx, full.plan, source).value(),
                                    .compute = [&](const Step&) {
                                      ++calls;
                                      return fails ? absl::InternalError("broken kernel") : absl::OkStatus();
                                    }};
      ExchangeStats stats;
      const absl::Status status = transport.Execute(gpu.ctx, full.plan, binding, &stats);
      gpu.ctx.lane.Synchronize();
      EXPECT_EQ(status.ok(), !fails);
      EXPECT_EQ(calls, fails ? 1 : std::count_if(steps.begin(), steps.end(), computes));
      const std::string step = absl::StrCat("rank ", gpu.cp.rank(), " step ", first, " (attend");
      EXPECT_EQ(status.message().find(step) != absl::string_view::npos, fails) << status;
    }
    RunAndCompare(gpu, transport, full.made, full.plan, 3);  // and goes on
  });
}

// A rank that never comes: the report names what the others wait for, and Abort frees their devices. (By the
// host it is hosts that wait.)
TEST(GpuExchange, CanBeAborted) {
  OnTransports([](GpuRank& gpu, ExchangeTransport& transport) {
    if (transport.kind() == TransportKind::kHost) return;
    const PlannedCase full = FullMask(gpu.cp.size(), Pass::kForward);
    RunAndCompare(gpu, transport, full.made, full.plan, 0);
    ASSERT_TRUE(gpu.cp.Barrier().ok());
    HomeMemory home(gpu);
    home.Fit(full.plan);
    Execution execution(gpu, full.made, full.plan, 1);
    ExchangeStats stats;
    if (gpu.cp.rank() == 0) {
      const ToyRank toy(full.made, full.plan, 0);
      const ArenaScope scope(gpu.ctx.scratch);
      ASSERT_TRUE(transport
                      .Slots(gpu.ctx, full.plan,
                             {.home = [&](Payload payload) { return home.Of(toy, payload); },
                              .fields = toy.source().fields})
                      .ok());
    } else {
      ASSERT_TRUE(execution.Run(transport, home, &stats).ok());
      Event end(gpu.ctx.device);
      end.Record(gpu.ctx.stream());
      SleepMicroseconds(300'000);
      EXPECT_FALSE(end.Done());
      const std::string report = gpu.ctx.recorder.Report();
      EXPECT_NE(report.find("exchange operands toward "), std::string::npos) << report;
      EXPECT_NE(report.find("waits for `rank "), std::string::npos) << report;
      transport.Abort();
      gpu.ctx.lane.Synchronize();
      EXPECT_TRUE(end.Done());
    }
    transport.Abort();
    EXPECT_EQ(transport.Execute(gpu.ctx, full.plan, ExchangeBinding(), &stats).code(),
              absl::StatusCode::kAborted);
    ASSERT_TRUE(gpu.cp.Barrier().ok());
  });
}

TEST(GpuExchange, HasARate) {
  OnTransports([](GpuRank& gpu, ExchangeTransport& transport) {
    const int64_t bytes = int64_t{16} << 20;
    const absl::StatusOr<ExchangeRate> rate = MeasureExchange(gpu.ctx, gpu.cp, transport, bytes, 5);
    EXPECT_EQ(rate.status().code() == absl::StatusCode::kInvalidArgument, gpu.cp.size() == 1)
        << rate.status();
    if (gpu.cp.size() == 1) return;
    ASSERT_TRUE(rate.ok()) << rate.status();
    EXPECT_GT(rate->one_way_gb_per_second, 0.1);
    EXPECT_LT(rate->one_way_gb_per_second, 1e4);
    EXPECT_GT(rate->both_ways_gb_per_second, 0.1);
    EXPECT_LT(rate->both_ways_gb_per_second, 1e4);
    if (gpu.cp.rank() == 0) {
      std::printf("%s, %d ranks, 16 MiB: %.1f GB/s one way, %.1f both ways\n",
                  std::string(Name(transport.kind())).c_str(), gpu.cp.size(), rate->one_way_gb_per_second,
                  rate->both_ways_gb_per_second);
    }
    if (transport.kind() != TransportKind::kCopyEngine) return;
    const absl::StatusOr<double> plain = MeasurePlainCopies(gpu.ctx, gpu.cp, bytes, 5);
    ASSERT_TRUE(plain.ok()) << plain.status();
    EXPECT_GT(*plain, 0.1);
    EXPECT_LT(*plain, 1e4);
    if (gpu.cp.rank() == 0) std::printf("plain copies: %.1f GB/s\n", *plain);
  });
}

// Both neighbours of a ring of three or more are reached by links of their own. No message is faster than its
// link; where ranks have a GPU each and what moves the bytes is much faster, they are hardly slower.
TEST(GpuExchange, IsAsSlowAsItsThrottledLinks) {
  constexpr double kRate = 0.5e9;
  OnTransports(
      [](GpuRank& gpu, ExchangeTransport& transport) {
        for (const PlannedCase& each : AllPlans(gpu.cp.size(), 500))
          RunAndCompare(gpu, transport, each.made, each.plan, 0);
        if (gpu.cp.size() == 1) return;
        const ExchangeRate rate = MeasureExchange(gpu.ctx, gpu.cp, transport, int64_t{2} << 20, 3).value();
        const double links = gpu.cp.size() == 2 ? 1 : 2;
        if (gpu.cp.rank() == 0) {
          std::printf("%s, throttled to %.2f GB/s: %.3f one way, %.3f both ways\n",
                      std::string(Name(transport.kind())).c_str(), kRate / 1e9, rate.one_way_gb_per_second,
                      rate.both_ways_gb_per_second);
        }
        EXPECT_LE(rate.one_way_gb_per_second, 1.001 * kRate / 1e9);
        EXPECT_LE(rate.both_ways_gb_per_second, 1.001 * links * kRate / 1e9);
        if (!gpu.own_gpus) return;
        EXPECT_GE(rate.one_way_gb_per_second, 0.8 * kRate / 1e9);
        EXPECT_GE(rate.both_ways_gb_per_second, 0.8 * links * kRate / 1e9);
      },
      {.bytes_per_second = kRate});
}

// Ranks on one GPU can map each other's memory; only ranks with a GPU each have NCCL.
TEST(ChooseTransport, TakesTheBest) {
  GpuRank gpu;
  const TransportKind kind = ChooseTransport(gpu.cp, gpu.ctx).value();
  EXPECT_NE(kind, TransportKind::kHost);
  EXPECT_TRUE(GpuCount() > 1 || kind == TransportKind::kCopyEngine);
  if (!gpu.own_gpus) {
    const absl::Status refused = MakeTransport(TransportKind::kNccl, gpu.cp, gpu.ctx).status();
    EXPECT_NE(refused.message().find("share GPU"), absl::string_view::npos) << refused;
  }
}

}  // namespace
}  // namespace annulus::testing
