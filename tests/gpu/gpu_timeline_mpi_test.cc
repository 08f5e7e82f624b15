// ranks: 2 3 4
// Executions on GPUs by every transport that the machine offers, as they are measured. Ranks may share a GPU.

#include "comm/measured_timeline.h"
#include "gpu/exchange_run.h"

namespace annulus::testing {
namespace {

// Clocks of a device and its host, and of two devices by their hosts: an event and the two looks at the
// host's clock around it are closer. In one clock, events are precise to half a microsecond.
constexpr double kClocksSeconds = 200e-6, kEventSeconds = 2e-6;

// Halves of blocks of 64 MiB go both ways round the ring, while each pair of blocks copies as much on the
// device.
class LargeBlocks {
 public:
  explicit LargeBlocks(GpuRank& gpu)
      : gpu_(gpu),
        plan_(Plan(gpu.cp.size())),
        kv_(gpu.ctx.device, DType::kI64, {kRows, kElements}),
        beside_(gpu.ctx.device, DType::kI64, {kRows, kElements}),
        other_(gpu.ctx.device, DType::kU8, {kRows}),
        seen_(gpu.ctx.device, SeenBytes()) {}

  const ExchangePlan& plan() const { return plan_; }

  // Every rank's block is its number, in every execution another one; the blocks that came are looked at.
  absl::StatusOr<Simulation> Measure(ExchangeTransport& transport, StepClock& clock, int64_t execution) {
    Context& ctx = gpu_.ctx;
    const auto value = [&](int block) -> int64_t { return 100 * execution + block; };
    const std::vector<int64_t> block(static_cast<size_t>(kRows * kElements), value(gpu_.cp.rank()));
    Upload(ctx, block.data(), kv_.ref().bytes(), kv_.ref());
    const ArenaScope scope(ctx.scratch);
    ExchangeBinding binding;
    ANNULUS_ASSIGN_OR_RETURN(binding.slots, transport.Slots(ctx, plan_, Source()));
    std::vector<int64_t> expected;  // what computing should see, in its order
    auto* const got = static_cast<int64_t*>(seen_.data());
    binding.compute = [&](const Step& step) {
      const TensorRef& kv = binding.slots[static_cast<size_t>(step.attend.kv_slot)].fields[0];
      for (int i = 0; i < 4; ++i) CopyBytes(kv_.ref(), beside_.ref(), ctx.stream());
      for (const int64_t element : ElementsOf(step)) {
        CopyBytes(TensorRef(static_cast<int64_t*>(kv.raw()) + element, DType::kI64, ctx.device, {1}),
                  TensorRef(got + expected.size(), DType::kI64, Device{}, {1}), ctx.stream());
        expected.push_back(value(step.attend.kv_rows[0].block));
      }
      return absl::OkStatus();
    };
    ANNULUS_RETURN_IF_ERROR(clock.Start(ctx, gpu_.cp));
    ExchangeStats stats{.clock = &clock};
    ANNULUS_RETURN_IF_ERROR(transport.Execute(ctx, plan_, binding, &stats));
    absl::StatusOr<Simulation> measured = clock.Take(plan_, gpu_.cp);
    ctx.lane.Synchronize();
    EXPECT_EQ(std::vector<int64_t>(got, got + expected.size()), expected);
    EXPECT_GE(expected.size(), static_cast<size_t>(2 * kRows * gpu_.cp.size()));
    EXPECT_EQ(stats.bytes_sent, (gpu_.cp.size() - 1) * kv_.ref().bytes());
    return measured;
  }

 private:
  static constexpr int64_t kRows = 2, kElements = int64_t{1} << 22;  // a row is half a block

  static ExchangePlan Plan(int ranks) {
    const PlanChoice choice{.kind = PlanKind::kBidirectionalKvRing};
    const ExchangeCase made = ExchangeCaseMaker(1).Make(ranks, kRows, kRows * ranks, CaseLayout::kContiguous,
                                                        CaseMask::kFull, {.parts = ChunkParts(choice)});
    return BuildPlan(made.problem, Pass::kForward, choice).value();
  }

  // Of each row that an attend names, its first and its last element.
  static std::vector<int64_t> ElementsOf(const Step& step) {
    std::vector<int64_t> elements;
    EXPECT_EQ(step.attend.kv_rows.size(), 1u);
    const RowRange& rows = step.attend.kv_rows[0].rows;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      elements.push_back(row * kElements);
      elements.push_back((row + 1) * kElements - 1);
    }
    return elements;
  }
  int64_t SeenBytes() const {
    int64_t bytes = 0;
    for (const Step& step : plan_.ranks[static_cast<size_t>(gpu_.cp.rank())].steps) {
      if (step.kind != StepKind::kAttend) continue;
      bytes += static_cast<int64_t>(ElementsOf(step).size() * sizeof(int64_t));
    }
    return bytes;
  }

  SlotSource Source() const {
    return {.home =
                [this](Payload payload) {
                  return SlotMemory{.fields = {payload == Payload::kKv ? kv_.ref() : other_.ref()}};
                },
            .fields = [](const SlotSpec&) -> std::vector<SlotField> {
              return {{.dtype = DType::kI64, .row = {kElements}}};
            }};
  }

  GpuRank& gpu_;
  const ExchangePlan plan_;
  const Tensor kv_, beside_;
  const Tensor other_;  // queries and outputs, which nobody looks at
  PinnedBuffer seen_;   // by computing
};

TEST(GpuTimeline, ShowsEveryStepAndBothDirectionsAtOnce) {
  ASSERT_GE(World().size(), 2) << "needs ranks to exchange with";
  OnTransports([](GpuRank& gpu, ExchangeTransport& transport) {
    LargeBlocks blocks(gpu);
    StepClock clock(gpu.ctx.device);
    TimelineOverlap overlaps;  // of all executions: a machine with other work may delay one of them
    for (int64_t execution = 0; execution < 3; ++execution) {
      const absl::StatusOr<Simulation> measured = blocks.Measure(transport, clock, execution);
      ASSERT_TRUE(measured.ok()) << measured.status();
      // Transfers by the host are seen by the host's clock, computing by the device's.
      const bool one_clock = transport.kind() != TransportKind::kHost;
      CheckMeasured(blocks.plan(), *measured,
                    {.own = one_clock ? kEventSeconds : kClocksSeconds, .others = kClocksSeconds});
      for (size_t r = 0; r < measured->compute.size(); ++r)
        EXPECT_GT(measured->compute[r], 0) << "rank " << r;
      const TimelineOverlap overlap = OverlapOf(blocks.plan(), *measured);
      overlaps.both_ways += overlap.both_ways;
      overlaps.under_compute += overlap.under_compute;
      if (gpu.cp.rank() == 0) {
        std::printf("%s, %d ranks: %.3f ms, %s\n", std::string(Name(transport.kind())).c_str(), gpu.cp.size(),
                    measured->makespan * 1e3, OverlapText(overlap).c_str());
      }
    }
    EXPECT_GT(overlaps.both_ways, 0);
    EXPECT_GT(overlaps.under_compute, 0);
  });
}

}  // namespace
}  // namespace annulus::testing
