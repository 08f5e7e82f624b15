#pragma once

// A few training steps of all ranks as an EventGraph, and what each rank's time in the last of them is spent
// on.
//
// All ranks run the same stages, so tasks are added stage by stage, for all of them. Where a rank waits for
// others, the time until the last of them has come is a bubble; what follows is the transfer's.
//
// Replicas. Undisturbed, data-parallel replicas on hosts that are filled alike all do the same: only the
// first few are simulated.
//
// Micro-batches. The first waits for parameters, the last reduces gradients; those between are alike, and
// one stands for them all.

#include <vector>

#include "absl/container/inlined_vector.h"
#include "annulus/base/random.h"
#include "annulus/comm/process_mesh.h"
#include "annulus/study/simulate_step.h"
#include "simulate_step_cluster.h"

namespace annulus {

enum class Share { kCompute, kExchange, kGradients, kTensor, kBubble };
inline constexpr int kShares = 5;

struct SimulatedStep {
  double seconds[kShares] = {};  // means over ranks
  SentBytes sent;
};

class StepGraph {
 public:
  StepGraph(const MeshShape& shape, const MachineProfile& machine, Cluster::Pattern pattern,
            const StepCost& cost, const Disturbance& disturbance);

  SimulatedStep Simulate();

 private:
  // From where a rank's account is to the end of `until`, if that is later, time is `share`; of a computing
  // task `exchange` seconds are not.
  struct Entry {
    TaskId until = kNoTask;
    Share share = Share::kCompute;
    float times = 1;
    double exchange = 0;
  };
  // A collective that a rank takes part in.
  struct Under {
    TaskId all_here = kNoTask, end = kNoTask;
    Share share = Share::kTensor;
  };
  struct RankState {
    TaskId last = kNoTask;                     // computing
    absl::InlinedVector<TaskId, 4> waits_for;  // besides, before it goes on
    absl::InlinedVector<Under, 2> meanwhile;   // behind the next stage
    double slowness = 1;
    TaskId account_begins = kNoTask;
    std::vector<Entry> account;
  };
  // Ranks of one tp place: their collectives run one behind the other.
  struct Lane {
    RankGroup group;
    TaskId last = kNoTask;                   // collective
    TaskId all_here = kNoTask;               // for the last
    std::vector<TaskId> gathered_by_bucket;  // of the step before
    std::vector<TaskId> updated_by_bucket;   // on all ranks, of the step before
  };

  void AddGroups();
  void FindTraffic();
  void AddStep(int step);
  void AddMicroBatch(int64_t micro, int64_t micro_batches);
  void AddStages(const std::vector<Stage>& stages);
  void AddCompute(double seconds);
  void AddExchange(const Stage& stage);
  void AddCollective(const Stage& stage);
  void WaitForMeanwhile();
  void WaitForParameters(const LayerCost& layer);
  void Reduce(int bucket);
  TaskId SumReplicated(int bucket);
  void Update();
  void SumNumbers();

  RankState& StateOf(int rank) { return ranks_[static_cast<size_t>(rank)]; }
  Lane& LaneOf(int rank) { return lanes_[static_cast<size_t>(rank % shape_.tp)]; }
  double Factor(int rank);
  TaskId ComputeOn(int rank, double seconds);
  void WaitFor(int rank, const Under& collective);
  TaskId JoinArrivals(const RankGroup& group);
  void Account(int rank, TaskId until, Share share, double exchange = 0);
  void CountSent(const SentBytes& sent);  // by all ranks
  int64_t replicas() const { return shape_.world() / simulated_; }

  MeshShape shape_;
  int simulated_;  // ranks
  const StepCost& cost_;
  const Disturbance& disturbance_;
  RandomStream jitter_;
  EventGraph graph_;
  Cluster cluster_;
  std::vector<RankState> ranks_;
  std::vector<RankGroup> cp_groups_, tp_groups_;
  RankGroup world_;
  std::vector<Lane> lanes_;
  // [exchange][cp group][place in it]
  std::vector<std::vector<std::vector<RankTraffic>>> traffic_;
  std::vector<char> reduced_;  // by bucket, in this step
  bool counted_ = false;       // this step is
  int64_t times_ = 1;          // that this micro-batch counts
  uint64_t drawn_ = 0;         // stages
  SentBytes sent_;
};

}  // namespace annulus
