// Transports on the CPU; those of GPUs are in tests/gpu.

#include <map>
#include <thread>

#include "../../comm/exchange/throttled_comm.h"
#include "annulus/comm/exchange_bench.h"
#include "comm/exchange_execute_checks.h"

namespace annulus {
namespace {

TEST(Transport, HasAName) {
  EXPECT_EQ(Name(TransportKind::kHost), "host");
  EXPECT_EQ(Name(TransportKind::kNccl), "nccl");
  EXPECT_EQ(Name(TransportKind::kCopyEngine), "copy engine");
}

TEST(Transport, OfCpusIsTheHost) {
  testing::OnLoopback(2, [](Communicator comm) {
    Context ctx{Device{}};
    EXPECT_EQ(ChooseTransport(comm, ctx).value(), TransportKind::kHost);
    for (const TransportKind kind : {TransportKind::kNccl, TransportKind::kCopyEngine}) {
      const absl::Status refused = MakeTransport(kind, comm, ctx).status();
      EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_EQ(refused.message().find(absl::StrCat("exchange by ", Name(kind))), 0u) << refused;
    }
  });
}

TEST(Transport, RefusesAThrottleThatIsNoRate) {
  testing::OnLoopback(1, [](Communicator comm) {
    Context ctx{Device{}};
    for (const double rate : {-1.0, std::numeric_limits<double>::infinity(), std::nan("")}) {
      const absl::Status refused =
          MakeTransport(TransportKind::kHost, comm, ctx, {.bytes_per_second = rate}).status();
      EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_EQ(refused.message().find("throttle.bytes_per_second="), 0u) << refused;
    }
  });
}

TEST(HostTransport, TakesSlotsFromScratchMemory) {
  testing::OnLoopback(3, [](Communicator comm) {
    Context ctx{Device{}};
    const std::unique_ptr<ExchangeTransport> transport = testing::HostTransport(comm);
    EXPECT_EQ(transport->kind(), TransportKind::kHost);
    EXPECT_TRUE(transport->Health().ok());
    const testing::ExchangeCase made = testing::CaseFor({.head_split = 3}, 3, 1);
    const ExchangePlan plan = BuildPlan(made.problem, Pass::kForward, {.head_split = 3}).value();
    testing::ToyRank rank(made, plan, comm.rank());
    const std::vector<SlotSpec>& specs = plan.ranks[static_cast<size_t>(comm.rank())].slots;
    int64_t bytes = 0;
    {
      const ArenaScope scope(ctx.scratch);
      const std::vector<SlotMemory> slots = transport->Slots(ctx, plan, rank.source()).value();
      ASSERT_EQ(slots.size(), specs.size());
      for (size_t s = 0; s < specs.size(); ++s) {
        const SlotMemory& own = rank.slots()[s];
        ASSERT_EQ(slots[s].fields.size(), own.fields.size());
        for (size_t f = 0; f < own.fields.size(); ++f) {
          EXPECT_EQ(slots[s].fields[f].shape(), own.fields[f].shape());
          EXPECT_EQ(slots[s].fields[f].dtype(), own.fields[f].dtype());
          EXPECT_EQ(slots[s].fields[f].raw() == own.fields[f].raw(), specs[s].home);
          if (!specs[s].home) bytes += own.fields[f].bytes();
        }
      }
      EXPECT_GE(ctx.scratch.used_bytes(), bytes);
    }
    EXPECT_EQ(ctx.scratch.used_bytes(), 0);
    ExchangeStats stats;
    ASSERT_TRUE(testing::RunToy(ctx, *transport, plan, &rank, &stats).ok());
    EXPECT_EQ(rank.Compare(), "");
    // Waiting is the context's clock's, too.
    EXPECT_NEAR(ctx.waits.TakeSeconds(WaitKind::kExchange), stats.exposed_seconds, 1e-3);
  });
}

// Messages of one link one after the other; other links and the way back beside it. Both ends see the same.
TEST(ThrottledLinks, HoldEachMessageForItsBytes) {
  testing::OnLoopback(3, [](Communicator comm) {
    constexpr double kSeconds = 20e-3;  // of a message
    constexpr int64_t kBytes = 1000;
    Communicator slow = WithLinkRate(comm, kBytes / kSeconds).value();
    struct Part {
      int from, to, tag;
    };
    const Part parts[] = {{0, 1, 1}, {0, 1, 0}, {0, 2, 0}, {1, 0, 0}, {2, 1, 0}};
    std::vector<std::vector<char>> memory(std::size(parts), std::vector<char>(kBytes));
    // Ranks take their turns at the cores: the shortest of several runs counts.
    constexpr int kRuns = 8;
    std::map<std::pair<int, int>, std::vector<double>> ends;  // by link, in order
    for (int run = 0; run < kRuns; ++run) {
      const double start = testing::Now();
      ASSERT_TRUE(comm.Barrier().ok());
      std::vector<std::pair<Part, Request>> requests;
      for (size_t i = 0; i < std::size(parts); ++i) {
        const Part& part = parts[i];
        const TensorRef data(memory[i].data(), DType::kU8, Device{}, {kBytes});
        if (part.from == comm.rank()) requests.emplace_back(part, slow.Send(data, part.to, part.tag).value());
        if (part.to == comm.rank())
          requests.emplace_back(part, slow.Receive(data, part.from, part.tag).value());
      }
      std::map<std::pair<int, int>, size_t> ended;
      while (!requests.empty()) {
        std::erase_if(requests, [&](auto& each) {
          if (!each.second.Test().value()) return false;
          const double took = testing::Now() - start;
          const std::pair<int, int> link(each.first.from, each.first.to);
          const size_t before = ended[link]++;
          EXPECT_GE(took, static_cast<double>(before + 1) * kSeconds);
          if (ends[link].size() <= before) ends[link].push_back(took);
          ends[link][before] = std::min(ends[link][before], took);
          return true;
        });
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      }
    }
    for (const auto& [link, best] : ends) {
      for (size_t i = 0; i < best.size(); ++i) {
        EXPECT_LT(best[i], (static_cast<double>(i) + 1.5) * kSeconds)
            << "message " << i << " from " << link.first << " to " << link.second << " at " << comm.rank();
      }
    }
  });
}

TEST(MeasureExchange, CountsBytesOfAllRanks) {
  testing::OnLoopback(3, [](Communicator comm) {
    Context ctx{Device{}};
    const std::unique_ptr<ExchangeTransport> transport =
        MakeTransport(TransportKind::kHost, comm, ctx).value();
    const absl::StatusOr<ExchangeRate> rate = MeasureExchange(ctx, comm, *transport, 1 << 20, 3);
    ASSERT_TRUE(rate.ok()) << rate.status();
    EXPECT_GT(rate->one_way_gb_per_second, 1e-3);
    EXPECT_LT(rate->one_way_gb_per_second, 1e3);
    EXPECT_GT(rate->both_ways_gb_per_second, 1e-3);
    EXPECT_LT(rate->both_ways_gb_per_second, 1e3);
  });
}

TEST(MeasureExchange, RefusesWhatHasNoRate) {
  testing::OnLoopback(1, [](Communicator comm) {
    Context ctx{Device{}};
    const std::unique_ptr<ExchangeTransport> transport =
        MakeTransport(TransportKind::kHost, comm, ctx).value();
    EXPECT_EQ(MeasureExchange(ctx, comm, *transport, 1 << 20).status().message(),
              "ranks=1: expected at least 2 to exchange between");
  });
  testing::OnLoopback(2, [](Communicator comm) {
    Context ctx{Device{}};
    const std::unique_ptr<ExchangeTransport> transport =
        MakeTransport(TransportKind::kHost, comm, ctx).value();
    EXPECT_EQ(MeasureExchange(ctx, comm, *transport, 1).status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(MeasureExchange(ctx, comm, *transport, 8, 0).status().code(),
              absl::StatusCode::kInvalidArgument);
  });
}

}  // namespace
}  // namespace annulus
