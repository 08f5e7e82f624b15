#pragma once

// A small model's optimizer on meshes of threads: its ranks, and gradients that each of them knows.

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "annulus/base/random.h"
#include "annulus/train/optimizer.h"
#include "support/loopback.h"
#include "support/optimizer_step.h"

namespace annulus::testing {

using Tensors = std::map<std::string, std::vector<double>>;

// Shards cut through parameters, most group sizes need padding, and ranks of tensor-parallel groups hold
// different numbers of elements. Keys and values and Mamba's B and C are on all of them; wide parameters have
// a bucket of their own.
inline ModelSpec SmallSpec() {
  ModelSpec spec;
  spec.d_model = 5, spec.vocab_size = 11;
  spec.heads = 4, spec.kv_heads = 1, spec.head_dim = 4;
  spec.d_ff = 12;
  spec.mamba = {.heads = 4, .head_dim = 2, .state = 3, .groups = 1, .conv = 2};
  spec.init_stddev = 0.5;
  spec.tied_head = false;
  spec.meta_tokens = 3;
  spec.layers = {{.branches = {{.kind = BranchKind::kAttention}}},
                 {.branches = {{.kind = BranchKind::kMlp}}},
                 {.branches = {{.kind = BranchKind::kMamba}}}};
  return spec;
}
inline constexpr int kBuckets = 6;

inline OptimSpec SmallOptim(double clip_norm) {
  OptimSpec spec;
  spec.beta1 = 0.8, spec.beta2 = 0.9, spec.eps = 1e-3;  // large, so that a misplaced epsilon shows
  spec.weight_decay = 0.3;
  spec.clip_norm = clip_norm;
  return spec;
}

inline constexpr double kLr = 0.05;

// Gradient of one parameter's element at a step, on a rank of a group.
inline double GradientAt(const std::string& name, int64_t i, int64_t step, int rank) {
  const RandomStream random(static_cast<uint64_t>(step), absl::StrCat(name, "/", rank));
  return random.Normal(static_cast<uint64_t>(i));
}

inline Tensors ValuesOf(const ParamStore& params) {
  Tensors values;
  for (const ParamInfo& info : params.table().params) {
    const TensorRef value = params.Value(params.table().IndexOf(info.name));
    values[info.name] = std::vector<double>(value.data<double>(), value.data<double>() + value.elements());
  }
  return values;
}

struct Mesh {
  int shards = 1, tp = 1;
};
inline void PrintTo(const Mesh& mesh, std::ostream* out) { *out << mesh.shards << " x " << mesh.tp; }

inline OptimizerGroups GroupsOf(Communicator world, const Mesh& mesh) {
  return {.shards = world.Split(world.rank() % mesh.tp, world.rank()).value(),
          .tensor = TensorParallel(world.Split(world.rank() / mesh.tp, world.rank()).value())};
}
inline ParamTable TableOf(const ModelSpec& spec, const OptimizerGroups& groups) {
  return BuildParamTable(spec, {.rank = groups.tensor.rank(), .size = groups.tensor.size()});
}

struct Rank {
  ParamStore& params;
  ShardedAdamW& optimizer;
  Context& ctx;
  OptimizerGroups groups;
  double clip_norm;

  int shard() const { return groups.shards.rank(); }
  bool first() const { return shard() == 0 && groups.tensor.rank() == 0; }
  double FinishStep(int64_t step) {
    return testing::FinishStep(ctx, optimizer,
                               {.groups = groups, .clip_norm = clip_norm, .step = step, .lr = kLr});
  }
};

// One mesh under test. Every rank runs `body(rank)`.
template <typename Body>
void OnGroup(const Mesh& mesh, const OptimSpec& spec, Body&& body) {
  OnLoopback(mesh.shards * mesh.tp, [&](Communicator world) {
    const OptimizerGroups groups = GroupsOf(world, mesh);
    ParamStore params(Device{}, DType::kF64, TableOf(SmallSpec(), groups), mesh.shards);
    params.Initialize(9);
    Context ctx{Device{}};
    ShardedAdamW optimizer(ctx, spec, SmallSpec(), params, groups);
    Rank rank{params, optimizer, ctx, groups, spec.clip_norm};
    body(rank);
  });
}

// Adds this rank's gradients of a bucket, of all if it is negative: gradient(name, index in the whole
// parameter). Of what every tensor-parallel rank holds the first has all but `elsewhere`, which the others
// have.
template <typename Fn>
void AddGradients(ParamStore& params, const TensorParallel& tensor, int bucket, double elsewhere,
                  Fn&& gradient) {
  for (const ParamInfo& info : params.table().params) {
    if (bucket >= 0 && info.bucket != bucket) continue;
    double* grad = params.Grad(params.table().IndexOf(info.name)).data<double>();
    for (const LogicalRun& run : LogicalRuns(info, 0, info.shape.elements())) {
      for (int64_t i = 0; i < run.elements; ++i) {
        double value = gradient(info.name, run.logical + i);
        if (info.parts.empty()) {
          value = tensor.rank() == 0 ? value - elsewhere * (tensor.size() - 1) : elsewhere;
        }
        grad[run.local + i] += value;
      }
    }
  }
}
inline void ZeroGradients(ParamStore& params) {
  for (int bucket = 0; bucket < params.buckets(); ++bucket) {
    const TensorRef grads = params.BucketGrads(bucket);
    std::fill_n(grads.data<double>(), grads.elements(), 0.0);
  }
}
// Of a step, on every rank.
inline void FillGradients(Rank& rank, int64_t step) {
  ZeroGradients(rank.params);
  AddGradients(rank.params, rank.groups.tensor, -1, 0.25,
               [&](const std::string& name, int64_t i) { return GradientAt(name, i, step, rank.shard()); });
}

// One step from the gradients in `params`; returns their norm.
inline double TakeStep(Rank& rank, int64_t step) {
  for (int bucket = 0; bucket < rank.params.buckets(); ++bucket) {
    ANNULUS_CHECK_OK(rank.optimizer.StartReduce(bucket));
  }
  return rank.FinishStep(step);
}

inline constexpr Mesh kMeshes[] = {{1, 1}, {2, 1}, {3, 1}, {4, 1}, {1, 2}, {2, 2}, {3, 2}, {1, 4}};

}  // namespace annulus::testing
