// Steps of costs made by hand, with times worked out by hand.

#include "annulus/study/simulate_step.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "annulus/comm/process_mesh.h"

namespace annulus {
namespace {

constexpr double kLinkRate = 100;  // bytes a second

LinkRate Link(double per_second, double message_seconds = 0) {
  return {.transport = TransportKind::kNccl,
          .one_way = {{1, per_second}},
          .both_ways = {{1, per_second}},
          .message_seconds = message_seconds};
}

// `ranks_per_host` 0: one host.
MachineProfile Machine(int ranks_per_host = 0) {
  MachineProfile machine;
  machine.links = {Link(kLinkRate)};
  machine.collective_step_seconds = machine.network.collective_step_seconds = 0;
  machine.network.ranks_per_host = ranks_per_host;
  machine.network.links = {Link(kLinkRate)};
  return machine;
}

RunSpec RunOn(const MeshShape& shape) {
  RunSpec spec;
  spec.device = DeviceChoice::kCuda;
  spec.parallel.dp = shape.dp, spec.parallel.cp = shape.cp, spec.parallel.tp = shape.tp;
  spec.data.seq_len = 1000;
  spec.optim.sequences_per_step = 8;
  return spec;
}

Stage Computing(double seconds) { return {.kind = StageKind::kCompute, .seconds = seconds}; }

// Layers of 1 second forward and 2 backward, each with a bucket.
StepCost Layers(int layers, int64_t gradient_bytes = 0, int64_t parameter_bytes = 0) {
  StepCost cost;
  for (int i = 0; i < layers; ++i) {
    cost.layers.push_back({.name = absl::StrCat("layer ", i),
                           .buckets = {i},
                           .forward = {Computing(0.75), Computing(0.25)},
                           .backward = {Computing(2)}});
    cost.buckets.push_back(
        {.gradient_bytes = gradient_bytes, .parameter_bytes = parameter_bytes, .update_seconds = 0.5});
  }
  cost.flops = {.causal = 1e12, .full = 2e12};
  return cost;
}

// An exchange between two ranks in the middle of each pass of each layer: 3 seconds, one of them exposed.
StepCost WithExchange(StepCost cost, int64_t bytes) {
  cost.exchanges = {{.plan = "kv_ring",
                     .transport = TransportKind::kNccl,
                     .seconds = {3, 3},
                     .exposed = {1, 1},
                     .sent = {{.from = 0, .to = 1, .bytes = bytes}, {.from = 1, .to = 0, .bytes = bytes}}}};
  for (LayerCost& layer : cost.layers) {
    layer.forward.insert(layer.forward.begin() + 1, {.kind = StageKind::kExchange, .exchange = 0});
    layer.backward.push_back({.kind = StageKind::kExchange, .exchange = 0});
  }
  return cost;
}

void ExpectSharesAddUp(const StepFigures& figures) {
  EXPECT_DOUBLE_EQ(figures.compute_seconds + figures.exposed_exchange_seconds +
                       figures.exposed_gradients_seconds + figures.exposed_tensor_seconds +
                       figures.bubble_seconds,
                   figures.step_seconds);
}

TEST(SimulateStep, ComputingAloneIsItsSum) {
  for (const int64_t micro_batches : {1, 2, 3, 7}) {
    StepCost cost = Layers(3);
    cost.micro_batches = micro_batches;
    MachineProfile machine = Machine();
    machine.peak_tflops = 4000;
    const StepFigures figures = SimulateStep(RunOn({}), machine, cost);
    EXPECT_DOUBLE_EQ(figures.step_seconds, 9 * static_cast<double>(micro_batches) + 1.5);
    EXPECT_DOUBLE_EQ(figures.compute_seconds, figures.step_seconds);
    EXPECT_DOUBLE_EQ(figures.tokens_per_second, 8000 / figures.step_seconds);
    EXPECT_DOUBLE_EQ(figures.tflops_causal, figures.tokens_per_second);
    EXPECT_DOUBLE_EQ(figures.tflops_full, 2 * figures.tokens_per_second);
    EXPECT_DOUBLE_EQ(figures.mfu_causal, figures.tflops_causal / 4000);
    EXPECT_EQ(figures.bytes_inside_hosts + figures.bytes_between_hosts, 0);
  }
}

// Of two ranks each sends half of a bucket: 1.5 seconds, within the 2 of the next layer's backward but for
// the last of all. Gathering takes 0.5, as an update does.
TEST(SimulateStep, GradientsHideBehindBackward) {
  const StepFigures figures = SimulateStep(RunOn({.dp = 2}), Machine(), Layers(4, 300, 100));
  EXPECT_NEAR(figures.compute_seconds, 4 * 3 + 4 * 0.5, 1e-9);
  EXPECT_NEAR(figures.exposed_gradients_seconds, 1.5, 1e-9);
  EXPECT_NEAR(figures.bubble_seconds, 0, 1e-9);
  EXPECT_EQ(figures.bytes_inside_hosts, 4 * (300 + 100));
  ExpectSharesAddUp(figures);
}

// 10 seconds for each bucket, one behind the other: all but the backward's 2 x 2 that come before the last
// is complete. Gathering: 5 for each bucket, from the first one's update on.
TEST(SimulateStep, GradientsThatDoNotHideAreExposed) {
  const StepFigures figures = SimulateStep(RunOn({.dp = 2}), Machine(), Layers(3, 2000, 1000));
  EXPECT_NEAR(figures.compute_seconds, 9 + 1.5, 1e-9);
  const double reducing = 30 - 4;
  const double gathering = 15 - (3 * 0.5 - 0.5) - 2;  // but for other updates, and forward but for the last
  EXPECT_NEAR(figures.exposed_gradients_seconds, reducing + gathering, 1e-9);
  ExpectSharesAddUp(figures);
}

TEST(SimulateStep, ExchangesExposeWhatTheirPlansDo) {
  const StepCost cost = WithExchange(Layers(2), 100);
  const StepFigures figures = SimulateStep(RunOn({.cp = 2}), Machine(), cost);
  EXPECT_NEAR(figures.compute_seconds, 2 * (3 + 2 * 2) + 1, 1e-9);
  EXPECT_NEAR(figures.exposed_exchange_seconds, 4, 1e-9);
  EXPECT_NEAR(figures.step_seconds, 2 * (3 + 6) + 1, 1e-9);
  EXPECT_EQ(figures.bytes_inside_hosts, 4 * 200);
  EXPECT_EQ(figures.plans, std::vector<std::string>{"forward: kv_ring by nccl"});
  // Messages for which the links need more than the pass: 400 bytes, 4 seconds.
  const StepFigures slow = SimulateStep(RunOn({.cp = 2}), Machine(), WithExchange(Layers(2), 400));
  EXPECT_NEAR(slow.exposed_exchange_seconds, 8, 1e-9);
  ExpectSharesAddUp(slow);
}

// Reducing takes longer than all that is computed, so that every exchange has half of the links; halving the
// network's rate then costs as much again.
TEST(SimulateStep, GradientsAndExchangesContendForTheHost) {
  const RunSpec spec = RunOn({.dp = 2, .cp = 2});
  MachineProfile machine = Machine(1);
  const StepCost free = WithExchange(Layers(2), 300), contended = WithExchange(Layers(2, 2000), 300);
  const auto exchange = [&](const StepCost& cost, double host_rate) {
    machine.network.host_bytes_per_second = host_rate;
    const StepFigures figures = SimulateStep(spec, machine, cost);
    ExpectSharesAddUp(figures);
    return figures.exposed_exchange_seconds;
  };
  EXPECT_NEAR(exchange(free, 0), 4, 1e-9);
  EXPECT_NEAR(exchange(free, 50), 4 * (6 - 2), 1e-9);
  // Of the four passes the last layer's bucket is being reduced during one: 6 seconds in place of 3.
  EXPECT_NEAR(exchange(contended, 0), 4 + 3, 1e-9);
  EXPECT_NEAR(exchange(contended, 50), 3 * (6 - 2) + (12 - 2), 1e-9);
}

TEST(SimulateStep, TensorCollectivesAndStatesTakeTheirTime) {
  StepCost cost = Layers(1);
  cost.layers[0].forward.push_back({.kind = StageKind::kTensorGather, .bytes = 100});
  cost.layers[0].backward.push_back({.kind = StageKind::kTensorScatter, .bytes = 50});
  cost.layers[0].backward.push_back({.kind = StageKind::kStates, .bytes = 25});
  const RunSpec spec = RunOn({.dp = 1, .cp = 2, .tp = 2});
  const StepFigures figures = SimulateStep(spec, Machine(), cost);
  EXPECT_NEAR(figures.exposed_tensor_seconds, 1.5, 1e-9);
  EXPECT_NEAR(figures.exposed_exchange_seconds, 0.25, 1e-9);
  EXPECT_EQ(figures.bytes_inside_hosts, 4 * 175);
  EXPECT_EQ(figures.bytes_between_hosts, 0);
  // Of hosts of two the tensor group is inside.
  EXPECT_EQ(SimulateStep(spec, Machine(2), cost).bytes_between_hosts, 4 * 25);
  // Measured rates of collectives hold inside a host; the least measured is the least that one takes.
  MachineProfile measured = Machine(2);
  measured.collectives = {{100, 10}, {1000, 10}};
  const StepFigures by_rate = SimulateStep(spec, measured, cost);
  EXPECT_NEAR(by_rate.exposed_tensor_seconds, 20, 1e-9);
  EXPECT_NEAR(by_rate.exposed_exchange_seconds, 0.25, 1e-9);
  ExpectSharesAddUp(by_rate);
}

// One second of gathering besides one stage, and no more than that.
TEST(SimulateStep, CollectivesRunWhileTheNextStageComputes) {
  const auto exposed = [](std::vector<Stage> behind) {
    StepCost cost = Layers(1);
    std::vector<Stage>& forward = cost.layers[0].forward;
    forward.push_back({.kind = StageKind::kTensorGather, .bytes = 100, .overlaps_next = true});
    forward.insert(forward.end(), behind.begin(), behind.end());
    const StepFigures figures = SimulateStep(RunOn({.tp = 2}), Machine(), cost);
    ExpectSharesAddUp(figures);
    return figures.exposed_tensor_seconds;
  };
  EXPECT_NEAR(exposed({Computing(2), Computing(2)}), 0, 1e-9);
  EXPECT_NEAR(exposed({Computing(0.25), Computing(2)}), 0.75, 1e-9);
  EXPECT_NEAR(exposed({}), 0, 1e-9) << "besides the backward";
  // Both are under way at once, on the same links.
  const Stage another{.kind = StageKind::kTensorGather, .bytes = 100, .overlaps_next = true};
  EXPECT_NEAR(exposed({another, Computing(0.5), Computing(2)}), 1.5, 1e-9);
}

// Four ranks on hosts of two. A ring leaves each host as often as it enters it; parts that are sent straight
// to their rank do so two times of three.
TEST(SimulateStep, CollectivesBetweenHosts) {
  RunSpec spec = RunOn({.dp = 4});
  MachineProfile machine = Machine(2);
  machine.network.links = {Link(10)};
  StepCost cost = Layers(1, 400);
  const StepFigures ring = SimulateStep(spec, machine, cost);
  EXPECT_EQ(ring.bytes_inside_hosts, 600);
  EXPECT_EQ(ring.bytes_between_hosts, 600);
  EXPECT_NEAR(ring.exposed_gradients_seconds, 15, 1e-9);  // of 300 a rank half, at 10 a second
  spec.device = DeviceChoice::kCpu;
  const StepFigures direct = SimulateStep(spec, machine, cost);
  EXPECT_EQ(direct.bytes_between_hosts, 800);
  EXPECT_NEAR(direct.exposed_gradients_seconds, 20, 1e-9);
  // A host's ranks share its card.
  machine.network.host_bytes_per_second = 10;
  EXPECT_NEAR(SimulateStep(spec, machine, cost).exposed_gradients_seconds, 40, 1e-9);
  // Each begins with a message's time, and a rank's second message to the other host leaves 0.1 behind the
  // first: so do, to all and back, the tokens that count, the norm, and what is reported.
  machine.network.links = {Link(10, 1)};
  machine.links = {Link(kLinkRate, 0.5)};
  const double sums = 3 * 2 * (1 + 0.1);
  EXPECT_NEAR(SimulateStep(spec, machine, cost).exposed_gradients_seconds, 40 + 1 + sums, 1e-9);
  // Measured rates of collectives have that in them but for the second message, as they were measured with
  // one: 200 of a rank between hosts, 100 inside.
  machine.collectives = {{1, kLinkRate}};
  machine.network.collectives = {{50, 5}, {200, 5}};
  EXPECT_NEAR(SimulateStep(spec, machine, cost).exposed_gradients_seconds, 40 + 0.1 + sums, 1e-9);
}

// Of a bucket without bytes worth the time, exposed whole: what the group's size alone makes of it. Hosts of
// eight; a step takes 1 inside and 4 between, a message 30 and 60.
TEST(SimulateStep, CollectivesTakeLongerInLargerGroups) {
  MachineProfile machine = Machine(8);
  machine.ranks = 4;
  machine.links = {Link(1e12, 30)}, machine.network.links = {Link(1e12, 60)};
  machine.collective_step_seconds = 1, machine.network.collective_step_seconds = 4;
  const auto exposed = [&](int ranks, DeviceChoice device) {
    RunSpec spec = RunOn({.dp = ranks});
    spec.device = device;
    return SimulateStep(spec, machine, Layers(1, 4096)).exposed_gradients_seconds;
  };
  for (const int ranks : {2, 8, 64, 512, 4096}) {
    SCOPED_TRACE(ranks);
    const int hosts = (ranks + 7) / 8, here = std::min(ranks, 8);
    const double ring = (ranks - hosts) + 4.0 * (hosts - 1);
    const double start = hosts > 1 ? 60 : 30, tree = (here - 1) + 4 * std::log2(hosts);
    const double sums = 3 * (start + 2 * tree);
    machine.collectives.clear();
    EXPECT_NEAR(exposed(ranks, DeviceChoice::kCuda), start + ring + sums, 1e-6);
    // Measured among the four of a host, in 7 seconds: three of the steps inside are in it. Between hosts
    // nothing is, so that those connections take longer.
    machine.collectives = {{1e6, 1e6 / 7}};
    const double inside = 7 + std::max(0.0, ring - 3);
    EXPECT_NEAR(exposed(ranks, DeviceChoice::kCuda), (hosts > 1 ? start + ring : inside) + sums, 1e-6);
  }
  // Of messages that a rank sends to each other one: 0.5 seconds for each that follows.
  machine.collectives.clear();
  machine.links = {{TransportKind::kHost, {{1e6, 2e6}}, {{1e6, 2e6}}, 30, 1}};
  machine.network = {};
  for (const int ranks : {2, 64, 4096}) {
    SCOPED_TRACE(ranks);
    const double sums = 3 * 2 * (30 + 0.5 * (ranks - 2));
    EXPECT_NEAR(exposed(ranks, DeviceChoice::kCpu), 30 + 0.5 * (ranks - 1) + sums, 1e-6 * sums);
  }
}

// A reduction of 3 seconds under the 2 of the next layer's backward and its wait: at half the speed those are
// 3.5, and the other bucket's reduction waits for the first.
TEST(SimulateStep, ComputingBesideCollectivesIsSlower) {
  MachineProfile machine = Machine();
  const StepCost cost = Layers(2, 600);
  const RunSpec spec = RunOn({.dp = 2});
  const StepFigures alone = SimulateStep(spec, machine, cost);
  EXPECT_NEAR(alone.compute_seconds, 2 * 3 + 2 * 0.5, 1e-9);
  EXPECT_NEAR(alone.exposed_gradients_seconds, 1 + 3, 1e-9);
  machine.collective_slowdown = 2;
  const StepFigures beside = SimulateStep(spec, machine, cost);
  // 1.5 of 2 seconds' work are done in 3.
  EXPECT_NEAR(beside.compute_seconds, alone.compute_seconds + 1.5, 1e-9);
  EXPECT_NEAR(beside.exposed_gradients_seconds, 3, 1e-9);
  ExpectSharesAddUp(beside);
}

// Of two tensor-parallel ranks, each sends half of what both hold to the other, and its half of the sums.
TEST(SimulateStep, ReplicatedGradientsAreSummedOverTensorRanks) {
  StepCost cost = Layers(1);
  cost.buckets[0].gradient_bytes = 800, cost.buckets[0].replicated_bytes = 200;
  const StepFigures one = SimulateStep(RunOn({.tp = 2}), Machine(), cost);
  EXPECT_NEAR(one.exposed_gradients_seconds, 2, 1e-9);
  EXPECT_EQ(one.bytes_inside_hosts, 400);
  ExpectSharesAddUp(one);
  // Then the whole bucket over the data-parallel ranks: half of it by each of four.
  const StepFigures two = SimulateStep(RunOn({.dp = 2, .tp = 2}), Machine(), cost);
  EXPECT_NEAR(two.exposed_gradients_seconds, 2 + 4, 1e-9);
  EXPECT_EQ(two.bytes_inside_hosts, 2 * 400 + 2 * 800);
  ExpectSharesAddUp(two);
}

TEST(SimulateStep, JitterAndStragglersSlowDown) {
  const RunSpec spec = RunOn({.dp = 4, .cp = 2});
  const StepCost cost = WithExchange(Layers(3, 100, 100), 100);
  const double even = SimulateStep(spec, Machine(), cost).step_seconds;
  const StepFigures jittery = SimulateStep(spec, Machine(), cost, {.seed = 1, .jitter = 0.1});
  EXPECT_GT(jittery.step_seconds, even);
  EXPECT_LT(jittery.step_seconds, even * 1.3);
  EXPECT_GT(jittery.bubble_seconds, 0);
  ExpectSharesAddUp(jittery);
  EXPECT_EQ(SimulateStep(spec, Machine(), cost, {.seed = 1, .jitter = 0.1}).step_seconds,
            jittery.step_seconds);
  EXPECT_NE(SimulateStep(spec, Machine(), cost, {.seed = 2, .jitter = 0.1}).step_seconds,
            jittery.step_seconds);

  const StepFigures slow =
      SimulateStep(spec, Machine(), Layers(3, 3, 3), {.straggler_share = 0.1, .straggler_slowdown = 1.5});
  EXPECT_NEAR(slow.step_seconds, 1.5 * (9 + 1.5), 0.1);
  EXPECT_NEAR(slow.compute_seconds, (1.5 + 7) / 8 * (9 + 1.5), 1e-9);
  ExpectSharesAddUp(slow);
}

TEST(SimulateStep, WeakScalingIsFlatWithoutCommunication) {
  const double one = SimulateStep(RunOn({}), Machine(8), Layers(4)).step_seconds;
  for (const int dp : {2, 16, 128}) {
    const StepFigures figures = SimulateStep(RunOn({.dp = dp}), Machine(8), Layers(4));
    EXPECT_NEAR(figures.step_seconds, one, 1e-9);
  }
}

// Replicas that do alike need not all be simulated: with a share of stragglers that are none, all are.
TEST(SimulateStep, ReplicasStandForEachOther) {
  StepCost cost = WithExchange(Layers(3, 700, 300), 150);
  cost.micro_batches = 4;
  cost.layers[1].forward.push_back({.kind = StageKind::kTensorGather, .bytes = 90});
  cost.layers[1].backward.push_back({.kind = StageKind::kStates, .bytes = 60, .overlaps_next = true});
  for (const int ranks_per_host : {0, 2, 4, 6, 8}) {
    for (const DeviceChoice device : {DeviceChoice::kCuda, DeviceChoice::kCpu}) {
      SCOPED_TRACE(absl::StrCat(ranks_per_host, " ranks a host"));
      RunSpec spec = RunOn({.dp = 6, .cp = 2, .tp = 2});
      spec.device = device;
      MachineProfile machine = Machine(ranks_per_host);
      machine.network.host_bytes_per_second = 130;
      const StepFigures some = SimulateStep(spec, machine, cost);
      const StepFigures all = SimulateStep(spec, machine, cost, {.straggler_share = 1});
      EXPECT_NEAR(some.step_seconds, all.step_seconds, 1e-9 * all.step_seconds);
      EXPECT_NEAR(some.exposed_exchange_seconds, all.exposed_exchange_seconds, 1e-9 * all.step_seconds);
      EXPECT_NEAR(some.exposed_gradients_seconds, all.exposed_gradients_seconds, 1e-9 * all.step_seconds);
      EXPECT_NEAR(some.exposed_tensor_seconds, all.exposed_tensor_seconds, 1e-9 * all.step_seconds);
      EXPECT_EQ(some.bytes_inside_hosts, all.bytes_inside_hosts);
      EXPECT_EQ(some.bytes_between_hosts, all.bytes_between_hosts);
    }
  }
}

// A bucket that two layers share is complete behind the backward of the one that comes first in forward.
TEST(SimulateStep, SharedBucketsWaitForTheirFirstLayer) {
  StepCost cost = Layers(2, 0);
  cost.buckets[1].gradient_bytes = 200;  // one second
  EXPECT_NEAR(SimulateStep(RunOn({.dp = 2}), Machine(), cost).exposed_gradients_seconds, 0, 1e-9);
  cost.layers[0].buckets = {0, 1};
  EXPECT_NEAR(SimulateStep(RunOn({.dp = 2}), Machine(), cost).exposed_gradients_seconds, 1, 1e-9);
}

TEST(CheckNetwork, RefusesMoreRanksThanAHostHas) {
  MachineProfile machine;
  machine.device = "toaster", machine.ranks = 2;
  const auto check = [&](DeviceChoice device, int64_t ranks) { return CheckNetwork(device, machine, ranks); };
  EXPECT_TRUE(check(DeviceChoice::kCpu, 256).ok());
  EXPECT_EQ(check(DeviceChoice::kCpu, 257).message(),
            "machine profile of toaster: network.link: missing; expected network { ranks_per_host link } with "
            "rates between hosts for 257 ranks, as a host has at most 256");
  EXPECT_TRUE(check(DeviceChoice::kCuda, 8).ok());
  EXPECT_FALSE(check(DeviceChoice::kCuda, 9).ok());
  machine.network.ranks_per_host = 4;  // of a study's point on two hosts
  EXPECT_TRUE(absl::EndsWith(check(DeviceChoice::kCpu, 8).message(), "for 8 ranks, as a host has 4"));
  machine.network.links = {Link(1)};
  EXPECT_TRUE(check(DeviceChoice::kCpu, 8).ok());
}

// 4096 ranks, 32 layers: well within a minute.
TEST(SimulateStep, ThousandsOfRanks) {
  const RunSpec spec = RunOn({.dp = 64, .cp = 64});
  StepCost cost = Layers(32, 1000, 1000);
  ExchangePass pass{
      .plan = "kv_ring", .seconds = std::vector<double>(64, 3), .exposed = std::vector<double>(64, 1)};
  for (int r = 0; r < 64; ++r) pass.sent.push_back({.from = r, .to = (r + 1) % 64, .bytes = 100});
  cost.exchanges = {pass};
  for (LayerCost& layer : cost.layers) {
    layer.forward.insert(layer.forward.begin() + 1, {.kind = StageKind::kExchange, .exchange = 0});
    layer.backward.push_back({.kind = StageKind::kExchange, .exchange = 0});
    layer.backward.push_back(Computing(1));
  }
  const StepFigures figures = SimulateStep(spec, Machine(8), cost, {.jitter = 0.01});
  const int64_t exchanged = 64 * 4096 * int64_t{100}, collected = 64 * 4095 * int64_t{1000};
  EXPECT_EQ(figures.bytes_inside_hosts + figures.bytes_between_hosts, exchanged + collected);
  EXPECT_EQ(figures.bytes_between_hosts, exchanged / 8 + collected / 8);
  EXPECT_GT(figures.step_seconds, 32 * 10);
  ExpectSharesAddUp(figures);
}

}  // namespace
}  // namespace annulus
