// What groups count: messages and collectives by where they go, and what is asked for is done as before.

#include "annulus/comm/traffic.h"

#include <gtest/gtest.h>

#include <numeric>
#include <thread>

#include "annulus/comm/process_mesh.h"

namespace annulus {
namespace {

// Runs `body` as rank 0, 1, ... of a group of threads.
template <typename Body>
void OnRanks(int size, const Body& body) {
  std::vector<Communicator> worlds = MakeLoopbackGroup(size);
  std::vector<std::thread> threads;
  for (int r = 0; r < size; ++r) threads.emplace_back([&, r] { body(r, worlds[static_cast<size_t>(r)]); });
  for (std::thread& thread : threads) thread.join();
}

TensorRef Ref(std::vector<float>& values) {
  return TensorRef(values.data(), DType::kF32, Device{}, {static_cast<int64_t>(values.size())});
}

// Ranks 0 and 1 on one host, 2 and 3 on another.
const std::vector<std::string> kHosts = {"a", "a", "b", "b"};

// Group ranks are world ranks backwards, so that neither can stand for the other.
TEST(Traffic, CollectivesCountAsRingsAndMessagesWhereTheyGo) {
  OnRanks(4, [](int world_rank, Communicator& world) {
    auto counter = std::make_shared<TrafficCounter>(kHosts, world_rank);
    Communicator group = WithTraffic(world.Split(0, -world_rank).value(), counter).value();
    ASSERT_EQ(group.rank(), 3 - world_rank);
    // The next rank of the ring is one less: of 2 and 0 it is on the other host.
    const bool crosses = world_rank % 2 == 0;
    const auto expect = [&](int64_t bytes, const char* what) {
      const SentTraffic want =
          crosses ? SentTraffic{.between_hosts_bytes = bytes} : SentTraffic{.inside_hosts_bytes = bytes};
      EXPECT_EQ(counter->Take(), want) << what << " of rank " << world_rank;
    };
    std::vector<float> eight(8, 1), two(2), own(2, static_cast<float>(world_rank));
    ASSERT_TRUE(group.AllReduce(Ref(eight), ReduceOp::kSum).ok());
    EXPECT_EQ(eight, std::vector<float>(8, 4));
    expect(2 * 3 * 8, "all-reduce");
    ASSERT_TRUE(group.ReduceScatter(Ref(eight), Ref(two)).ok());
    EXPECT_EQ(two, std::vector<float>(2, 16));
    expect(3 * 8, "reduce-scatter");
    ASSERT_TRUE(group.AllGather(Ref(own), Ref(eight)).ok());
    EXPECT_EQ(eight, (std::vector<float>{3, 3, 2, 2, 1, 1, 0, 0}));
    expect(3 * 8, "all-gather");
    ASSERT_TRUE(group.Broadcast(Ref(own), 0).ok());
    EXPECT_EQ(own, std::vector<float>(2, 3));
    expect(world_rank == 0 ? 0 : 8, "broadcast");

    // To the rank across from it, always on the other host.
    const int peer = (group.rank() + 2) % 4;
    Request send = group.Send(Ref(eight), peer, 0).value();
    std::vector<float> got(8);
    Request receive = group.Receive(Ref(got), peer, 0).value();
    ASSERT_TRUE(send.Wait().ok() && receive.Wait().ok());
    EXPECT_EQ(got, eight);
    EXPECT_EQ(counter->Take(), SentTraffic{.between_hosts_bytes = 32});
    EXPECT_EQ(counter->Take(), SentTraffic());

    Communicator pair = group.Split(group.rank() / 2, group.rank()).value();
    ASSERT_TRUE(pair.AllGather(Ref(two), Ref(own = std::vector<float>(4))).ok());
    EXPECT_EQ(counter->Take(), SentTraffic{.inside_hosts_bytes = 8}) << "of a group that was split";
  });
}

TEST(Traffic, AMeshCountsAllItsGroups) {
  OnRanks(4, [](int world_rank, Communicator& world) {
    ProcessMesh mesh = ProcessMesh::Create({.dp = 2, .cp = 2}, world).value();
    EXPECT_EQ(mesh.traffic, nullptr);
    ASSERT_TRUE(mesh.CountTraffic(kHosts[static_cast<size_t>(world_rank)]).ok());
    std::vector<float> four(4), two(2);
    ASSERT_TRUE(mesh.cp.AllGather(Ref(two), Ref(four)).ok());
    EXPECT_EQ(mesh.traffic->Take(), SentTraffic{.inside_hosts_bytes = 8});
    ASSERT_TRUE(mesh.dp.AllGather(Ref(two), Ref(four)).ok());
    EXPECT_EQ(mesh.traffic->Take(), SentTraffic{.between_hosts_bytes = 8});
    ASSERT_TRUE(mesh.dp_cp.AllReduce(Ref(four), ReduceOp::kSum).ok());
    EXPECT_EQ(mesh.traffic->Take(), (world_rank % 2 == 1 ? SentTraffic{.between_hosts_bytes = 24}
                                                         : SentTraffic{.inside_hosts_bytes = 24}));
    ASSERT_TRUE(mesh.tp.AllReduce(Ref(four), ReduceOp::kSum).ok());
    EXPECT_EQ(mesh.traffic->Take(), SentTraffic()) << "alone";
  });
}

}  // namespace
}  // namespace annulus
