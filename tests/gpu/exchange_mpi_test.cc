// ranks: 1 2 3 4
// Plans run by every transport that this machine offers, compared exactly with the direct computation.
// Computing is done by host functions that the stream calls, so all of it is ordered by the device and may be
// delayed. Ranks may share a GPU.

#include <cuda_runtime_api.h>

#include <cstring>
#include <deque>
#include <thread>

#include "annulus/comm/exchange_bench.h"
#include "annulus/comm/gpu_communicator.h"
#include "annulus/device/gpu.h"
#include "annulus/device/transfer.h"
#include "comm/exchange_cases.h"
#include "support/mpi_main.h"

namespace annulus {
namespace {

using testing::CaseLayout;
using testing::CaseMask;
using testing::ExchangeCase;
using testing::ExchangeCaseMaker;
using testing::ToyRank;
using testing::World;

constexpr Pass kPasses[] = {Pass::kForward, Pass::kBackward};
constexpr int64_t kRowBytes = 16;  // of a ToyRank's slots

void SleepMicroseconds(int64_t us) { std::this_thread::sleep_for(std::chrono::microseconds(us)); }

// This rank's GPU, and the group on it.
class GpuRank {
 public:
  GpuRank() : ctx(MyGpu()) {
    const GpuLink link = ChooseGpuLink(World(), ctx).value();
    own_gpus = link == GpuLink::kNccl;
    cp = WithGpu(World(), GpuLink::kHost, ctx).value();
  }

  Context ctx;
  Communicator cp;
  bool own_gpus = false;

 private:
  static Device MyGpu() {
    const int gpus = GpuCount();
    EXPECT_GT(gpus, 0) << WhyNoGpu();
    const Device device{DeviceKind::kCuda, World().rank() % std::max(gpus, 1)};
    EXPECT_TRUE(UseGpu(device.index).ok());
    return device;
  }
};

// Calls fn with each transport that the ranks can use on this machine; by the host they always can.
void OnTransports(const std::function<void(GpuRank&, ExchangeTransport&)>& fn) {
  GpuRank gpu;
  std::vector<TransportKind> kinds = {TransportKind::kHost};
  if (gpu.own_gpus) kinds.push_back(TransportKind::kNccl);
  if (ChooseTransport(gpu.cp, gpu.ctx).value() == TransportKind::kCopyEngine)
    kinds.push_back(TransportKind::kCopyEngine);
  for (const TransportKind kind : kinds) {
    SCOPED_TRACE(std::string(Name(kind)));
    const std::unique_ptr<ExchangeTransport> made = MakeTransport(kind, gpu.cp, gpu.ctx).value();
    EXPECT_EQ(made->kind(), kind);
    fn(gpu, *made);
  }
}

// `fn` is called by the stream when it gets there.
class HostCalls {
 public:
  void Enqueue(StreamHandle stream, std::function<void()> fn) {
    calls_.push_back(std::move(fn));
    const auto call = [](void* data) { (*static_cast<std::function<void()>*>(data))(); };
    ASSERT_EQ(cudaLaunchHostFunc(stream, call, &calls_.back()), cudaSuccess);
  }

 private:
  std::deque<std::function<void()>> calls_;
};

// One execution of a plan by this rank: toy attention on pinned copies of the slots, all of it enqueued.
class Execution {
 public:
  Execution(GpuRank& gpu, const ExchangeCase& made, const ExchangePlan& plan, int64_t number)
      : gpu_(gpu),
        plan_(plan),
        specs_(plan.ranks[static_cast<size_t>(gpu.cp.rank())].slots),
        toy_(made, plan, gpu.cp.rank(), number),
        slot_bytes_(plan.problem.block_rows * kRowBytes),
        pinned_(gpu.ctx.device, std::max<int64_t>(1, slot_bytes_ * static_cast<int64_t>(specs_.size()))),
        random_(static_cast<uint64_t>(number), absl::StrCat("delays of rank ", gpu.cp.rank())) {
    for (size_t i = 0; i < specs_.size(); ++i) {
      mirrors_.emplace_back(static_cast<char*>(pinned_.data()) + slot_bytes_ * static_cast<int64_t>(i),
                            DType::kI64, Device{}, Shape{plan.problem.block_rows, 2});
    }
    toy_.Bind(mirrors_);
  }

  // Computing takes a random time of up to so long.
  void set_delay_us(uint64_t delay_us) { delay_us_ = delay_us; }

  absl::Status Run(ExchangeTransport& transport, TensorRef home_kv, TensorRef home_grad,
                   ExchangeStats* stats) {
    const ArenaScope scope(gpu_.ctx.scratch);
    ANNULUS_ASSIGN_OR_RETURN(slots_, transport.Slots(gpu_.ctx, plan_, home_kv, home_grad));
    // What a slot held before must not matter.
    for (size_t i = 0; i < slots_.size(); ++i) CopyBytes(mirrors_[i], slots_[i], gpu_.ctx.stream());
    const ExchangeBinding binding{
        .slots = slots_,
        .attend = [this](const Step& step) { return Attend(step); },
        .reduce = [this](ConstTensorRef from, TensorRef to) { return Reduce(from, to); }};
    ANNULUS_RETURN_IF_ERROR(transport.Execute(gpu_.ctx, plan_, binding, stats));
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (specs_[i].home) ToHost(static_cast<int>(i), {0, plan_.problem.block_rows});
    }
    return absl::OkStatus();
  }

  // After the stream has got through.
  std::string Compare() const { return toy_.Compare(); }

 private:
  void ToHost(int slot, const RowRange& rows) {
    const size_t i = static_cast<size_t>(slot);
    CopyBytes(slots_[i].Rows(rows.begin, rows.end), mirrors_[i].Rows(rows.begin, rows.end),
              gpu_.ctx.stream());
  }
  void ToDevice(int slot, const RowRange& rows) {
    const size_t i = static_cast<size_t>(slot);
    CopyBytes(mirrors_[i].Rows(rows.begin, rows.end), slots_[i].Rows(rows.begin, rows.end),
              gpu_.ctx.stream());
  }
  void Call(std::function<void()> fn) {
    const int64_t delay_us = delay_us_ == 0 ? 0 : static_cast<int64_t>(random_.Below(draw_++, delay_us_));
    calls_.Enqueue(gpu_.ctx.stream(), [fn = std::move(fn), delay_us] {
      if (delay_us > 0) SleepMicroseconds(delay_us);
      fn();
    });
  }

  absl::Status Attend(const Step& step) {
    const bool overwrites = step.grad_write == GradWrite::kOverwrite;
    for (const BlockPair& pair : step.pairs) {
      ToHost(step.slot, pair.keys);
      if (step.grad_slot >= 0 && !overwrites) ToHost(step.grad_slot, pair.keys);
    }
    Call([this, step] { toy_.Attend(step); });
    if (step.grad_slot < 0) return absl::OkStatus();
    if (overwrites) ToDevice(step.grad_slot, step.rows);
    for (const BlockPair& pair : step.pairs) {
      if (!overwrites) ToDevice(step.grad_slot, pair.keys);
    }
    return absl::OkStatus();
  }

  // The slot of a piece of it, and its rows.
  std::pair<int, RowRange> PlaceOf(const ConstTensorRef& piece) const {
    const char* const at = static_cast<const char*>(piece.raw());
    for (size_t i = 0; i < slots_.size(); ++i) {
      const int64_t begin = at - static_cast<const char*>(slots_[i].raw());
      if (begin < 0 || begin >= slot_bytes_) continue;
      return {static_cast<int>(i), {begin / kRowBytes, begin / kRowBytes + piece.dim(0)}};
    }
    ADD_FAILURE() << "a piece of no slot";
    return {0, {0, 0}};
  }

  absl::Status Reduce(ConstTensorRef from, TensorRef to) {
    const auto [from_slot, rows] = PlaceOf(from);
    const auto [to_slot, to_rows] = PlaceOf(to);
    EXPECT_EQ(rows, to_rows);
    ToHost(from_slot, rows);
    ToHost(to_slot, rows);
    const Step step{.kind = StepKind::kReduce, .slot = from_slot, .grad_slot = to_slot, .rows = rows};
    Call([this, step] { toy_.Reduce(step); });
    ToDevice(to_slot, rows);
    return absl::OkStatus();
  }

  GpuRank& gpu_;
  const ExchangePlan& plan_;
  const std::vector<SlotSpec>& specs_;
  ToyRank toy_;
  const int64_t slot_bytes_;
  PinnedBuffer pinned_;
  std::vector<TensorRef> mirrors_, slots_;
  HostCalls calls_;
  RandomStream random_;
  uint64_t draw_ = 0, delay_us_ = 0;
};

// The caller's memory for blocks of `rows`.
struct Home {
  Home(GpuRank& gpu, int64_t rows)
      : kv(gpu.ctx.device, DType::kI64, {rows, 2}), grad(gpu.ctx.device, DType::kI64, {rows, 2}) {}
  Tensor kv, grad;
};

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

// Executions follow each other without the host waiting, of two plans and with other values each time, while
// ranks are late at random: no message may be taken for that of another execution.
TEST(GpuExchange, KeepsExecutionsApart) {
  OnTransports([](GpuRank& gpu, ExchangeTransport& transport) {
    const ExchangeCase causal = ExchangeCaseMaker(1).Make(gpu.cp.size(), 8, 8 * gpu.cp.size(),
                                                          CaseLayout::kZigzag, CaseMask::kCausal);
    const ExchangeCase sparse = ExchangeCaseMaker(5).Make(gpu.cp.size(), 8, 8 * gpu.cp.size(),
                                                          CaseLayout::kPieces, CaseMask::kSparse);
    const std::vector<std::pair<const ExchangeCase*, ExchangePlan>> plans = {
        {&causal, BuildKvRing(causal.problem, Pass::kForward)},
        {&causal, BuildKvRing(causal.problem, Pass::kBackward)},
        {&sparse, BuildKvRing(sparse.problem, Pass::kForward, RingDirection::kTowardHigher)},
        {&sparse, BuildKvRing(sparse.problem, Pass::kBackward, RingDirection::kTowardHigher)}};
    const Home home(gpu, 8);
    constexpr int kExecutions = 100;
    std::deque<Execution> executions;
    for (int i = 0; i < kExecutions; ++i) {
      const auto& [made, plan] = plans[static_cast<size_t>(i) % plans.size()];
      executions.emplace_back(gpu, *made, plan, i);
      executions.back().set_delay_us(i % 3 == 0 ? 300 : 0);
    }
    const RandomStream random(1, absl::StrCat("pauses of rank ", gpu.cp.rank()));
    ExchangeStats stats;
    int64_t bytes = 0;
    for (int i = 0; i < kExecutions; ++i) {
      const uint64_t draw = static_cast<uint64_t>(i);
      if (random.Below(2 * draw, 8) == 0)
        SleepMicroseconds(static_cast<int64_t>(random.Below(2 * draw + 1, 5000)));
      const absl::Status status =
          executions[static_cast<size_t>(i)].Run(transport, home.kv.ref(), home.grad.ref(), &stats);
      ASSERT_TRUE(status.ok()) << status;
      bytes +=
          BytesSent(plans[static_cast<size_t>(i) % plans.size()].second, gpu.cp.rank(), kRowBytes, kRowBytes);
    }
    gpu.ctx.lane.Synchronize();
    for (int i = 0; i < kExecutions; ++i)
      EXPECT_EQ(executions[static_cast<size_t>(i)].Compare(), "") << "execution " << i;
    EXPECT_EQ(stats.bytes_sent, bytes);
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
}  // namespace annulus
