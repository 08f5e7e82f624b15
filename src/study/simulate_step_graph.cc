#include "simulate_step_graph.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "annulus/base/check.h"

namespace annulus {
namespace {

// The first begins with all parameters there. All ranks meet for the norm of the gradients, so that from the
// second on steps are alike but for jitter.
constexpr int kSteps = 2;

// The last layer in backward order that has each bucket: its gradients are complete behind that one.
std::vector<size_t> LastLayers(const StepCost& cost) {
  std::vector<size_t> last(cost.buckets.size(), 0);
  for (size_t layer = cost.layers.size(); layer-- > 0;) {
    for (const int bucket : cost.layers[layer].buckets) last[static_cast<size_t>(bucket)] = layer;
  }
  return last;
}

int SimulatedRanks(const MeshShape& shape, const MachineProfile& machine, const Disturbance& disturbance) {
  const int replica = shape.cp * shape.tp, host = std::max(1, machine.network.ranks_per_host);
  const int alike = std::lcm(replica, host);
  const bool disturbed = disturbance.jitter > 0 || disturbance.straggler_share > 0;
  return disturbed || shape.world() % alike != 0 ? shape.world() : alike;
}

}  // namespace

StepGraph::StepGraph(const MeshShape& shape, const MachineProfile& machine, Cluster::Pattern pattern,
                     const StepCost& cost, const Disturbance& disturbance)
    : shape_(shape),
      simulated_(SimulatedRanks(shape, machine, disturbance)),
      cost_(cost),
      disturbance_(disturbance),
      jitter_(disturbance.seed, "jitter"),
      cluster_(shape.world(), simulated_, machine, pattern, &graph_),
      ranks_(static_cast<size_t>(simulated_)) {
  AddGroups();
  FindTraffic();
  const auto world = static_cast<uint64_t>(shape.world());
  const Permutation order(world, disturbance.seed, "stragglers");
  const auto slow =
      static_cast<uint64_t>(std::llround(disturbance.straggler_share * static_cast<double>(world)));
  for (uint64_t i = 0; i < std::min(slow, world); ++i)
    ranks_[order(i)].slowness = disturbance.straggler_slowdown;
}

void StepGraph::AddGroups() {
  std::map<std::pair<int, int>, std::vector<int>> cp, tp;
  std::map<int, std::vector<int>> dp_cp;
  std::vector<int> world;
  for (int r = 0; r < shape_.world(); ++r) {
    const MeshCoordinates at = CoordinatesOf(shape_, r);
    cp[{at.dp, at.tp}].push_back(r);
    tp[{at.dp, at.cp}].push_back(r);
    dp_cp[at.tp].push_back(r);
    world.push_back(r);
  }
  for (const auto& [at, ranks] : cp) {
    if (ranks[0] < simulated_) cp_groups_.push_back(cluster_.Group(ranks));
  }
  for (const auto& [at, ranks] : tp) {
    if (ranks[0] < simulated_) tp_groups_.push_back(cluster_.Group(ranks));
  }
  for (const auto& [at, ranks] : dp_cp) {
    lanes_.push_back({.group = cluster_.Group(ranks),
                      .gathered_by_bucket = std::vector<TaskId>(cost_.buckets.size(), kNoTask),
                      .updated_by_bucket = std::vector<TaskId>(cost_.buckets.size(), kNoTask)});
  }
  world_ = cluster_.Group(world);
}

void StepGraph::FindTraffic() {
  for (const ExchangePass& pass : cost_.exchanges) {
    std::vector<std::vector<RankTraffic>>& by_group = traffic_.emplace_back();
    for (const RankGroup& group : cp_groups_) {
      std::vector<RankTraffic>& traffic = by_group.emplace_back(group.ranks.size());
      for (const ExchangePass::Sent& sent : pass.sent) {
        const auto from = static_cast<size_t>(sent.from), to = static_cast<size_t>(sent.to);
        const bool inside = cluster_.HostOf(group.ranks[from]) == cluster_.HostOf(group.ranks[to]);
        const SentBytes bytes = inside ? SentBytes{.inside = sent.bytes} : SentBytes{.between = sent.bytes};
        traffic[from].out += bytes;
        traffic[to].in += bytes;
      }
    }
  }
}

SimulatedStep StepGraph::Simulate() {
  for (int step = 0; step < kSteps; ++step) AddStep(step);
  const std::vector<TaskTiming> times = graph_.Run();
  const auto end_of = [&](TaskId task) { return task == kNoTask ? 0 : times[static_cast<size_t>(task)].end; };
  SimulatedStep result{.sent = sent_};
  for (const RankState& rank : ranks_) {
    double account = end_of(rank.account_begins);
    for (const Entry& entry : rank.account) {
      const double end = std::max(account, end_of(entry.until));
      const double exchange = std::min(entry.exchange, end - account);
      result.seconds[static_cast<size_t>(entry.share)] += entry.times * (end - account - exchange);
      result.seconds[static_cast<size_t>(Share::kExchange)] += entry.times * exchange;
      account = end;
    }
  }
  for (double& seconds : result.seconds) seconds /= static_cast<double>(ranks_.size());
  return result;
}

void StepGraph::AddStep(int step) {
  counted_ = step == kSteps - 1;
  for (RankState& rank : ranks_) rank.account_begins = rank.last;
  reduced_.assign(cost_.buckets.size(), 0);
  if (shape_.dp > 1) SumNumbers();  // the tokens that count
  const int64_t micro_batches = std::min<int64_t>(cost_.micro_batches, 3);
  for (int64_t micro = 0; micro < micro_batches; ++micro) AddMicroBatch(micro, micro_batches);
  for (size_t bucket = 0; bucket < cost_.buckets.size(); ++bucket) {
    if (reduced_[bucket] == 0) Reduce(static_cast<int>(bucket));
  }
  Update();
}

void StepGraph::AddMicroBatch(int64_t micro, int64_t micro_batches) {
  const bool last = micro + 1 == micro_batches;
  times_ = micro > 0 && !last ? cost_.micro_batches - 2 : 1;
  for (const LayerCost& layer : cost_.layers) {
    if (micro == 0) WaitForParameters(layer);
    AddStages(layer.forward);
  }
  const std::vector<size_t> last_layers = LastLayers(cost_);
  for (size_t layer = cost_.layers.size(); layer-- > 0;) {
    AddStages(cost_.layers[layer].backward);
    for (const int bucket : cost_.layers[layer].buckets) {
      if (last && last_layers[static_cast<size_t>(bucket)] == layer) Reduce(bucket);
    }
  }
  times_ = 1;
}

// Kernels one behind the other are one task, but for what runs while something else does.
void StepGraph::AddStages(const std::vector<Stage>& stages) {
  double seconds = 0;
  for (size_t i = 0; i < stages.size(); ++i) {
    const Stage& stage = stages[i];
    const bool computes = stage.kind == StageKind::kCompute;
    if (computes) seconds += stage.seconds;
    const bool joins = computes && i + 1 < stages.size() && stages[i + 1].kind == StageKind::kCompute;
    if (joins && ranks_[0].meanwhile.empty()) continue;
    if (computes) AddCompute(std::exchange(seconds, 0));
    if (stage.kind == StageKind::kExchange) AddExchange(stage);
    if (!stage.overlaps_next) WaitForMeanwhile();
    if (!computes && stage.kind != StageKind::kExchange) AddCollective(stage);
  }
}

void StepGraph::AddCompute(double seconds) {
  if (seconds == 0) return;
  for (int r = 0; r < simulated_; ++r) Account(r, ComputeOn(r, seconds * Factor(r)), Share::kCompute);
  ++drawn_;
}

// What a rank computes before anything has arrived takes a block's share of the pass.
void StepGraph::AddExchange(const Stage& stage) {
  const ExchangePass& pass = cost_.exchanges[static_cast<size_t>(stage.exchange)];
  for (size_t g = 0; g < cp_groups_.size(); ++g) {
    const RankGroup& group = cp_groups_[g];
    const TaskId all_here = group.size > 1 ? JoinArrivals(group) : kNoTask;
    for (size_t i = 0; i < group.ranks.size(); ++i) {
      const int r = group.ranks[i];
      const double exposed = std::min(pass.exposed[i], pass.seconds[i]);
      const double computing = (pass.seconds[i] - exposed) * Factor(r), first = computing / group.size;
      Account(r, ComputeOn(r, first), Share::kCompute);
      if (group.size == 1) continue;
      Account(r, all_here, Share::kBubble);
      RankState& rank = StateOf(r);
      rank.last = graph_.Compute(r, computing - first + exposed, {all_here});
      Account(r, rank.last, Share::kCompute, exposed);
      std::vector<TaskId> flows;
      const RankTraffic& traffic = traffic_[static_cast<size_t>(stage.exchange)][g][i];
      cluster_.Messages(r, traffic, all_here, &flows);
      rank.waits_for.assign(flows.begin(), flows.end());
      for (const TaskId flow : flows) Account(r, flow, Share::kExchange);
      CountSent(replicas() * traffic.out);
    }
  }
  ++drawn_;
}

void StepGraph::AddCollective(const Stage& stage) {
  const bool tensor = stage.kind != StageKind::kStates;
  for (const RankGroup& group : tensor ? tp_groups_ : cp_groups_) {
    if (group.size == 1 || stage.bytes == 0) continue;
    const int64_t total = stage.bytes * group.size;
    Under collective{.all_here = JoinArrivals(group), .share = tensor ? Share::kTensor : Share::kExchange};
    collective.end = cluster_.Collective(group, total, collective.all_here);
    for (const int r : group.ranks) {
      if (stage.overlaps_next) {
        StateOf(r).meanwhile.push_back(collective);
      } else {
        StateOf(r).waits_for.clear();  // all_here has
        WaitFor(r, collective);
      }
    }
    CountSent(replicas() * cluster_.SentIn(group, total));
  }
}

void StepGraph::WaitForMeanwhile() {
  for (int r = 0; r < simulated_; ++r) {
    for (const Under& collective : StateOf(r).meanwhile) WaitFor(r, collective);
    StateOf(r).meanwhile.clear();
  }
}

void StepGraph::WaitFor(int rank, const Under& collective) {
  StateOf(rank).waits_for.push_back(collective.end);
  Account(rank, collective.all_here, Share::kBubble);
  Account(rank, collective.end, collective.share);
}

void StepGraph::WaitForParameters(const LayerCost& layer) {
  for (int r = 0; r < simulated_; ++r) {
    const Lane& lane = LaneOf(r);
    for (const int bucket : layer.buckets) {
      const auto b = static_cast<size_t>(bucket);
      if (lane.gathered_by_bucket[b] == kNoTask) continue;
      StateOf(r).waits_for.push_back(lane.gathered_by_bucket[b]);
      Account(r, lane.updated_by_bucket[b], Share::kBubble);
      Account(r, lane.gathered_by_bucket[b], Share::kGradients);
    }
  }
}

void StepGraph::Reduce(int bucket) {
  reduced_[static_cast<size_t>(bucket)] = 1;
  const TaskId summed = SumReplicated(bucket);
  for (Lane& lane : lanes_) {
    if (lane.group.size == 1 && summed == kNoTask) continue;
    const int64_t sent = cost_.buckets[static_cast<size_t>(bucket)].gradient_bytes * (lane.group.size - 1);
    lane.all_here = JoinArrivals(lane.group);
    lane.last = cluster_.Collective(lane.group, sent, graph_.Join({lane.all_here, lane.last, summed}));
    CountSent(cluster_.SentIn(lane.group, sent));
  }
}

// Over the tensor-parallel groups, parts to their ranks and sums to all; behind the reductions before. When
// all groups have done so, as those are alike.
TaskId StepGraph::SumReplicated(int bucket) {
  const int64_t bytes = cost_.buckets[static_cast<size_t>(bucket)].replicated_bytes;
  if (bytes == 0) return kNoTask;
  std::vector<TaskId> sums;
  for (const RankGroup& group : tp_groups_) {
    const int64_t sent = 2 * bytes * (group.size - 1);
    std::vector<TaskId> before = {JoinArrivals(group)};
    for (const int r : group.ranks) before.push_back(LaneOf(r).last);
    sums.push_back(cluster_.Collective(group, sent, graph_.Join(before)));
    CountSent(replicas() * cluster_.SentIn(group, sent));
  }
  return graph_.Join(sums);
}

// The step ends with it. Behind all reductions: the norm, then bucket by bucket the rank's shard, which is
// gathered while the next is updated.
void StepGraph::Update() {
  WaitForMeanwhile();
  for (int r = 0; r < simulated_; ++r) {
    const Lane& lane = LaneOf(r);
    if (lane.last == kNoTask) continue;
    StateOf(r).waits_for.push_back(lane.last);
    Account(r, lane.all_here, Share::kBubble);
    Account(r, lane.last, Share::kGradients);
  }
  SumNumbers();  // the norm
  for (size_t b = 0; b < cost_.buckets.size(); ++b) {
    AddCompute(cost_.buckets[b].update_seconds);
    for (Lane& lane : lanes_) {
      if (lane.group.size == 1) continue;
      const int64_t sent = cost_.buckets[b].parameter_bytes * (lane.group.size - 1);
      lane.updated_by_bucket[b] = JoinArrivals(lane.group);
      lane.last = cluster_.Collective(lane.group, sent, graph_.Join({lane.updated_by_bucket[b], lane.last}));
      lane.gathered_by_bucket[b] = lane.last;
      CountSent(cluster_.SentIn(lane.group, sent));
    }
  }
  SumNumbers();  // what each rank measured, for the report
  for (int r = 0; r < simulated_; ++r) ComputeOn(r, 0);
}

// Over all ranks, each of which waits for it.
void StepGraph::SumNumbers() {
  if (world_.size == 1) return;
  const TaskId all_here = JoinArrivals(world_), sum = cluster_.SmallSum(world_, all_here);
  for (const int r : world_.ranks) {
    StateOf(r).waits_for = {sum};
    Account(r, all_here, Share::kBubble);
    Account(r, sum, Share::kGradients);
  }
}

// Of computing: slower ranks, and jitter with a mean of 1.
double StepGraph::Factor(int rank) {
  const double slowness = StateOf(rank).slowness, sigma = disturbance_.jitter;
  if (sigma == 0) return slowness;
  const uint64_t index = drawn_ * static_cast<uint64_t>(shape_.world()) + static_cast<uint64_t>(rank);
  return slowness * std::exp(sigma * jitter_.Normal(index) - sigma * sigma / 2);
}

TaskId StepGraph::ComputeOn(int rank, double seconds) {
  RankState& state = StateOf(rank);
  state.last = graph_.Compute(rank, seconds, state.waits_for);
  state.waits_for.clear();
  return state.last;
}

TaskId StepGraph::JoinArrivals(const RankGroup& group) {
  std::vector<TaskId> arrivals;
  for (const int r : group.ranks) {
    const RankState& rank = StateOf(r);
    arrivals.push_back(rank.last);
    arrivals.insert(arrivals.end(), rank.waits_for.begin(), rank.waits_for.end());
  }
  return graph_.Join(arrivals);
}

void StepGraph::Account(int rank, TaskId until, Share share, double exchange) {
  if (!counted_) return;
  StateOf(rank).account.push_back(
      {.until = until, .share = share, .times = static_cast<float>(times_), .exchange = exchange});
}

void StepGraph::CountSent(const SentBytes& sent) {
  if (counted_) sent_ += times_ * sent;
}

}  // namespace annulus
