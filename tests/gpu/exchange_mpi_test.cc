// ranks: 1 2 3 4
// Plans run by every transport that this machine offers, compared exactly with the direct computation. Ranks
// may share a GPU.

#include "annulus/comm/exchange_bench.h"
#include "gpu/exchange_run.h"

namespace annulus::testing {
namespace {

constexpr Pass kPasses[] = {Pass::kForward, Pass::kBackward};

// One execution, its result and its bytes.
void RunAndCompare(GpuRank& gpu, ExchangeTransport& transport, const ExchangeCase& made,
                   const ExchangePlan& plan, int64_t number) {
  const Home home(gpu, plan.problem.block_rows);
  Execution execution(gpu, made, plan, number);
  ExchangeStats stats;
  const absl::Status status = execution.Run(transport, home.kv.ref(), home.grad.ref(), &stats);
  ASSERT_TRUE(status.ok()) << status;
  gpu.ctx.lane.Synchronize();
  EXPECT_EQ(execution.Compare(), "") << made.name << "\n" << ToString(plan);
  EXPECT_EQ(stats.bytes_sent, BytesSent(plan, gpu.cp.rank(), kRowBytes, kRowBytes));
}

TEST(GpuExchange, ComputesEveryPairOnce) {
  OnTransports([](GpuRank& gpu, ExchangeTransport& transport) {
    for (uint64_t seed = 0; seed < 8; ++seed) {
      const ExchangeCase made = ExchangeCaseMaker(seed).MakeRandom(gpu.cp.size());
      for (const Pass pass : kPasses) {
        for (const RingDirection direction : {RingDirection::kTowardLower, RingDirection::kTowardHigher}) {
          const ExchangePlan plan = BuildKvRing(made.problem, pass, direction);
          ASSERT_TRUE(AgreeOnPlan(plan, gpu.cp).ok());
          RunAndCompare(gpu, transport, made, plan, 0);
        }
      }
    }
    EXPECT_TRUE(transport.Health().ok());
  });
}

struct PlannedCase {
  const ExchangeCase* made;
  ExchangePlan plan;
};

// Executions that follow each other without the host waiting, with other values each time, each compared.
// Computing steps of execution i are late at random by up to delay_us(i); hosts pause at random.
void RunInARow(GpuRank& gpu, ExchangeTransport& transport, const std::vector<const PlannedCase*>& sequence,
               const std::function<uint64_t(size_t)>& delay_us) {
  const Home home(gpu, sequence[0]->plan.problem.block_rows);
  std::deque<Execution> executions;
  for (size_t i = 0; i < sequence.size(); ++i) {
    executions.emplace_back(gpu, *sequence[i]->made, sequence[i]->plan, static_cast<int64_t>(i));
    executions.back().set_delay_us(delay_us(i));
  }
  const RandomStream random(1, absl::StrCat("pauses of rank ", gpu.cp.rank()));
  ExchangeStats stats;
  int64_t bytes = 0;
  for (size_t i = 0; i < sequence.size(); ++i) {
    if (random.Below(2 * i, 8) == 0) SleepMicroseconds(static_cast<int64_t>(random.Below(2 * i + 1, 5000)));
    const absl::Status status = executions[i].Run(transport, home.kv.ref(), home.grad.ref(), &stats);
    ASSERT_TRUE(status.ok()) << status;
    bytes += BytesSent(sequence[i]->plan, gpu.cp.rank(), kRowBytes, kRowBytes);
  }
  gpu.ctx.lane.Synchronize();
  for (size_t i = 0; i < sequence.size(); ++i)
    EXPECT_EQ(executions[i].Compare(), "") << "execution " << i << ": " << sequence[i]->made->name;
  EXPECT_EQ(stats.bytes_sent, bytes);
}

void AddBothPasses(const ExchangeCase& made, RingDirection direction, std::vector<PlannedCase>* planned) {
  for (const Pass pass : kPasses) planned->push_back({&made, BuildKvRing(made.problem, pass, direction)});
}

// While ranks are late at random, no message may be taken for that of another execution.
TEST(GpuExchange, KeepsExecutionsApart) {
  OnTransports([](GpuRank& gpu, ExchangeTransport& transport) {
    const int ranks = gpu.cp.size();
    std::vector<ExchangeCase> cases;
    const auto add = [&](uint64_t seed, CaseLayout layout, CaseMask mask, int64_t padding) {
      cases.push_back(ExchangeCaseMaker(seed).Make(ranks, 8, 8 * ranks - padding, layout, mask));
    };
    add(1, CaseLayout::kZigzag, CaseMask::kCausal, 0);
    add(2, CaseLayout::kContiguous, CaseMask::kWindow, 0);
    add(3, CaseLayout::kZigzag, CaseMask::kWindow, 3);
    add(4, CaseLayout::kStriped, CaseMask::kWindow, 5);
    add(5, CaseLayout::kPieces, CaseMask::kSparse, 0);
    add(6, CaseLayout::kContiguous, CaseMask::kDocuments, 1);
    std::vector<PlannedCase> planned;
    for (const ExchangeCase& made : cases) {
      const bool even = planned.size() % 4 == 0;
      AddBothPasses(made, even ? RingDirection::kTowardLower : RingDirection::kTowardHigher, &planned);
    }
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
    std::vector<PlannedCase> planned;
    AddBothPasses(slow, RingDirection::kTowardLower, &planned);
    AddBothPasses(quick, RingDirection::kTowardLower, &planned);
    EXPECT_EQ(HaveAMessageInCommon(planned[0].plan, planned[2].plan), ranks > 2);
    std::vector<const PlannedCase*> sequence;
    for (int i = 0; i < 25; ++i) sequence.insert(sequence.end(), {&planned[0], &planned[2]});
    for (int i = 0; i < 25; ++i) sequence.insert(sequence.end(), {&planned[1], &planned[3]});
    RunInARow(gpu, transport, sequence, [&](size_t) { return gpu.cp.rank() == last ? 1000 : 0; });
  });
}

TEST(GpuExchange, TakesMoreMemoryForLargerBlocks) {
  OnTransports([](GpuRank& gpu, ExchangeTransport& transport) {
    for (const int64_t rows : {2, 64, 8, 256, 4}) {
      const ExchangeCase made = ExchangeCaseMaker(2).Make(gpu.cp.size(), rows, rows * gpu.cp.size(),
                                                          CaseLayout::kStriped, CaseMask::kDocuments);
      for (const Pass pass : kPasses)
        RunAndCompare(gpu, transport, made, BuildKvRing(made.problem, pass), rows);
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
    const ExchangePlan plan = BuildKvRing(problem, Pass::kForward);
    const Tensor home(gpu.ctx.device, DType::kI64, {rows, elements});
    const auto value = [&](int64_t owner, int64_t i, int64_t execution) {
      return owner * 1000 + execution * 10 + i % 7;
    };
    std::vector<int64_t> block(static_cast<size_t>(rows * elements)), got = block;
    for (int64_t execution = 0; execution < 3; ++execution) {
      for (int64_t i = 0; i < rows * elements; ++i)
        block[static_cast<size_t>(i)] = value(gpu.cp.rank(), i, execution);
      Upload(gpu.ctx, block.data(), home.ref().bytes(), home.ref());
      const ArenaScope scope(gpu.ctx.scratch);
      ExchangeBinding binding{.slots = transport.Slots(gpu.ctx, plan, home.ref(), TensorRef()).value()};
      int attended = 0;
      binding.attend = [&](const Step& step) {
        Download(gpu.ctx, binding.slots[static_cast<size_t>(step.slot)], got.data());
        int64_t wrong = 0;
        for (int64_t i = 0; i < rows * elements; ++i)
          wrong += got[static_cast<size_t>(i)] != value(step.block, i, execution) ? 1 : 0;
        EXPECT_EQ(wrong, 0) << "block " << step.block << ", execution " << execution;
        ++attended;
        return absl::OkStatus();
      };
      ExchangeStats stats;
      ASSERT_TRUE(transport.Execute(gpu.ctx, plan, binding, &stats).ok());
      gpu.ctx.lane.Synchronize();
      EXPECT_EQ(attended, gpu.cp.size());
      EXPECT_EQ(stats.bytes_sent, (gpu.cp.size() - 1) * home.ref().bytes());
    }
  });
}

ExchangeCase FullMask(int ranks) {
  return ExchangeCaseMaker(1).Make(ranks, 4, 4 * ranks, CaseLayout::kContiguous, CaseMask::kFull);
}

// All wait for rank 0, directly or by others that do.
TEST(GpuExchange, CountsWaitingForALateRank) {
  OnTransports([](GpuRank& gpu, ExchangeTransport& transport) {
    const ExchangeCase made = FullMask(gpu.cp.size());
    const ExchangePlan plan = BuildKvRing(made.problem, Pass::kForward);
    RunAndCompare(gpu, transport, made, plan, 0);
    gpu.ctx.waits.TakeSeconds(WaitKind::kExchange);
    ASSERT_TRUE(gpu.cp.Barrier().ok());
    constexpr int64_t kLateUs = 200'000;
    if (gpu.cp.rank() == 0) SleepMicroseconds(kLateUs);
    RunAndCompare(gpu, transport, made, plan, 1);
    const double waited = gpu.ctx.waits.TakeSeconds(WaitKind::kExchange);
    if (gpu.cp.rank() != 0) {
      EXPECT_GT(waited, 0.5e-6 * kLateUs);
      EXPECT_LT(waited, 5);
    }
  });
}

TEST(GpuExchange, SurvivesAFailingAttend) {
  OnTransports([](GpuRank& gpu, ExchangeTransport& transport) {
    const ExchangeCase made = FullMask(gpu.cp.size());
    const ExchangePlan plan = BuildKvRing(made.problem, Pass::kBackward);
    const Home home(gpu, 4);
    const bool fails = gpu.cp.rank() == gpu.cp.size() - 1;
    int calls = 0;
    {
      const ArenaScope scope(gpu.ctx.scratch);
      const ExchangeBinding binding{
          .slots = transport.Slots(gpu.ctx, plan, home.kv.ref(), home.grad.ref()).value(),
          .attend =
              [&](const Step&) {
                ++calls;
                return fails ? absl::InternalError("broken kernel") : absl::OkStatus();
              },
          .reduce = [](ConstTensorRef, TensorRef) { return absl::OkStatus(); }};
      ExchangeStats stats;
      const absl::Status status = transport.Execute(gpu.ctx, plan, binding, &stats);
      gpu.ctx.lane.Synchronize();
      EXPECT_EQ(status.ok(), !fails);
      EXPECT_EQ(calls, fails ? 1 : gpu.cp.size());
      const std::string step = absl::StrCat("rank ", gpu.cp.rank(), " step 0 (attend");
      EXPECT_EQ(status.message().find(step) != absl::string_view::npos, fails) << status;
    }
    RunAndCompare(gpu, transport, made, plan, 3);  // and goes on
  });
}

// A rank that never comes: the report names what the others wait for, and Abort frees their devices. (By the
// host it is hosts that wait.)
TEST(GpuExchange, CanBeAborted) {
  OnTransports([](GpuRank& gpu, ExchangeTransport& transport) {
    if (transport.kind() == TransportKind::kHost) return;
    const ExchangeCase made = FullMask(gpu.cp.size());
    const ExchangePlan plan = BuildKvRing(made.problem, Pass::kForward);
    RunAndCompare(gpu, transport, made, plan, 0);
    ASSERT_TRUE(gpu.cp.Barrier().ok());
    const Home home(gpu, 4);
    Execution execution(gpu, made, plan, 1);
    ExchangeStats stats;
    if (gpu.cp.rank() == 0) {
      const ArenaScope scope(gpu.ctx.scratch);
      ASSERT_TRUE(transport.Slots(gpu.ctx, plan, home.kv.ref(), home.grad.ref()).ok());
    } else {
      ASSERT_TRUE(execution.Run(transport, home.kv.ref(), home.grad.ref(), &stats).ok());
      Event end(gpu.ctx.device);
      end.Record(gpu.ctx.stream());
      SleepMicroseconds(300'000);
      EXPECT_FALSE(end.Done());
      const std::string report = gpu.ctx.recorder.Report();
      EXPECT_NE(report.find("exchange kv"), std::string::npos) << report;
      EXPECT_NE(report.find("waits for `rank "), std::string::npos) << report;
      transport.Abort();
      gpu.ctx.lane.Synchronize();
      EXPECT_TRUE(end.Done());
    }
    transport.Abort();
    EXPECT_EQ(transport.Execute(gpu.ctx, plan, ExchangeBinding(), &stats).code(), absl::StatusCode::kAborted);
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
