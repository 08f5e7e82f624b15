// AdamW sharded over loopback ranks, in tensor-parallel groups too, against plain AdamW over whole
// parameters.

#include <cmath>

#include "optim/optimizer_testing.h"

namespace annulus::testing {
namespace {

// Algorithm 2 of Loshchilov and Hutter (2019) on whole tensors, in long double.
class NaiveAdamW {
 public:
  explicit NaiveAdamW(const OptimSpec& spec)
      : spec_(spec), params_(Device{}, DType::kF64, BuildParamTable(SmallSpec()), 1) {
    params_.Initialize(9);
    for (const auto& [name, values] : ValuesOf(params_)) values_[name].assign(values.begin(), values.end());
  }

  // Gradients are sums over `ranks`. Returns their norm.
  double Step(int64_t step, int ranks) {
    long double squares = 0;
    std::map<std::string, std::vector<long double>> gradients;
    for (const auto& [name, values] : values_) {
      for (size_t i = 0; i < values.size(); ++i) {
        long double g = 0;
        for (int r = 0; r < ranks; ++r) g += GradientAt(name, static_cast<int64_t>(i), step, r);
        gradients[name].push_back(g);
        squares += g * g;
      }
    }
    const long double norm = std::sqrt(squares);
    long double scale = 1;
    if (spec_.clip_norm > 0 && norm > spec_.clip_norm) scale = spec_.clip_norm / norm;
    for (auto& [name, values] : values_) Update(name, gradients[name], scale, step, &values);
    return static_cast<double>(norm);
  }
  const std::map<std::string, std::vector<long double>>& values() const { return values_; }

 private:
  void Update(const std::string& name, const std::vector<long double>& gradient, long double scale,
              int64_t step, std::vector<long double>* values) {
    const bool matrix = params_.Value(params_.table().IndexOf(name)).rank() == 2;
    auto &m = m_[name], &v = v_[name];
    m.resize(values->size()), v.resize(values->size());
    const long double b1 = spec_.beta1, b2 = spec_.beta2, t = static_cast<long double>(step);
    for (size_t i = 0; i < values->size(); ++i) {
      const long double g = scale * gradient[i];
      m[i] = b1 * m[i] + (1 - b1) * g;
      v[i] = b2 * v[i] + (1 - b2) * g * g;
      const long double m_hat = m[i] / (1 - std::pow(b1, t)), v_hat = v[i] / (1 - std::pow(b2, t));
      const long double decay = matrix ? spec_.weight_decay : 0;
      (*values)[i] -= kLr * (m_hat / (std::sqrt(v_hat) + spec_.eps) + decay * (*values)[i]);
    }
  }

  OptimSpec spec_;
  ParamStore params_;
  std::map<std::string, std::vector<long double>> values_, m_, v_;
};

class ShardedAdamWTest : public ::testing::TestWithParam<Mesh> {};
INSTANTIATE_TEST_SUITE_P(Ranks, ShardedAdamWTest, ::testing::ValuesIn(kMeshes));

// Gradients have norms near 22 sqrt(ranks): a clip of 1 always acts, one of 1000 never.
TEST_P(ShardedAdamWTest, EqualsPlainAdamW) {
  const int ranks = GetParam().shards;
  for (const double clip_norm : {0.0, 1.0, 1000.0}) {
    SCOPED_TRACE(clip_norm);
    const OptimSpec spec = SmallOptim(clip_norm);
    NaiveAdamW naive(spec);
    std::vector<double> norms;
    for (int64_t step = 1; step <= 6; ++step) norms.push_back(naive.Step(step, ranks));
    OnGroup(GetParam(), spec, [&](Rank& rank) {
      for (int64_t step = 1; step <= 6; ++step) {
        FillGradients(rank, step);
        const double norm = TakeStep(rank, step);
        EXPECT_NEAR(norm, norms[static_cast<size_t>(step - 1)], 1e-12 * norm);
      }
      const Tensors values = ValuesOf(rank.params);
      for (const ParamInfo& info : rank.params.table().params) {
        const std::vector<long double>& expected = naive.values().at(info.name);
        for (const LogicalRun& run : LogicalRuns(info, 0, info.shape.elements())) {
          for (int64_t i = 0; i < run.elements; ++i) {
            const auto want = static_cast<double>(expected[static_cast<size_t>(run.logical + i)]);
            ASSERT_NEAR(values.at(info.name)[static_cast<size_t>(run.local + i)], want, 1e-12) << info.name;
          }
        }
      }
    });
  }
}

// With zero gradients only decay acts, on matrices alone; the padding of buckets stays zero.
TEST_P(ShardedAdamWTest, OnlyMatricesDecay) {
  OnGroup(GetParam(), SmallOptim(1), [&](Rank& rank) {
    const Tensors before = ValuesOf(rank.params);
    EXPECT_EQ(TakeStep(rank, 1), 0);
    for (const auto& [name, values] : ValuesOf(rank.params)) {
      const bool matrix = rank.params.Value(rank.params.table().IndexOf(name)).rank() == 2;
      for (size_t i = 0; i < values.size(); ++i) {
        const double x = before.at(name)[i];
        ASSERT_NEAR(values[i], matrix ? x - kLr * 0.3 * x : x, 1e-15) << name;
      }
    }
    for (int bucket = 0; bucket < rank.params.buckets(); ++bucket) {
      const TensorRef values = rank.params.BucketValues(bucket);
      for (int64_t i = rank.params.table().buckets[static_cast<size_t>(bucket)].elements;
           i < values.elements(); ++i) {
        EXPECT_EQ(values.data<double>()[i], 0) << "padding of bucket " << bucket;
      }
    }
  });
}

// Buckets may be reduced in any order that the ranks share, polled or not: not a bit depends on it.
TEST_P(ShardedAdamWTest, OrderOfReductionsDoesNotMatter) {
  std::vector<Tensors> results;
  for (const std::vector<int>& order :
       {std::vector{0, 1, 2, 3, 4, 5}, {5, 4, 3, 2, 1, 0}, {2, 0, 5, 3, 1, 4}}) {
    ASSERT_EQ(order.size(), static_cast<size_t>(kBuckets));
    Tensors result;
    OnGroup(GetParam(), SmallOptim(1), [&](Rank& rank) {
      for (int64_t step = 1; step <= 3; ++step) {
        FillGradients(rank, step);
        for (int bucket : order) {
          ANNULUS_CHECK_OK(rank.optimizer.StartReduce(bucket));
          if (step == 2) rank.optimizer.Poll();
        }
        rank.FinishStep(step);
      }
      if (rank.first()) result = ValuesOf(rank.params);
    });
    results.push_back(std::move(result));
  }
  EXPECT_EQ(results[1], results[0]);
  EXPECT_EQ(results[2], results[0]);
}

// Buckets whose gradients take turns in memory, reduced as a backward pass completes them: the same bits.
TEST_P(ShardedAdamWTest, GradientsThatShareMemoryGiveTheSameUpdate) {
  ModelSpec model = SmallSpec();
  for (int i = 0; i < 3; ++i) model.layers.insert(model.layers.end(), {model.layers[0], model.layers[1]});
  std::vector<Tensors> results;
  for (const GradientMemory memory : {GradientMemory::kAll, GradientMemory::kTurns}) {
    Tensors result;
    OnLoopback(GetParam().shards * GetParam().tp, [&](Communicator world) {
      const OptimizerGroups groups = GroupsOf(world, GetParam());
      ParamStore params(Device{}, DType::kF64, TableOf(model, groups), GetParam().shards, memory);
      Context ctx{Device{}};
      const OptimSpec spec = SmallOptim(1);
      ShardedAdamW optimizer(ctx, spec, model, params, groups);
      ANNULUS_CHECK_OK(optimizer.Initialize(9));
      for (int64_t step = 1; step <= 3; ++step) {
        for (int bucket = params.buckets() - 1; bucket >= 0; --bucket) {
          ANNULUS_CHECK_OK(optimizer.PrepareGradients(bucket));
          AddGradients(params, groups.tensor, bucket, 0.25, [&](const std::string& name, int64_t i) {
            return GradientAt(name, i, step, groups.shards.rank());
          });
          ANNULUS_CHECK_OK(optimizer.StartReduce(bucket));
        }
        FinishStep(ctx, optimizer, {.groups = groups, .clip_norm = spec.clip_norm, .step = step, .lr = kLr});
      }
      if (world.rank() == 0) result = ValuesOf(params);
    });
    results.push_back(std::move(result));
  }
  EXPECT_EQ(results[1], results[0]);
}

// m and v; gradients are reduced in place, but where another bucket's come to lie in the same memory.
TEST_P(ShardedAdamWTest, HoldsItsShareOfTheState) {
  const int ranks = GetParam().shards;
  OnGroup(GetParam(), SmallOptim(1), [&](Rank& rank) {
    EXPECT_EQ(rank.optimizer.state_bytes() * ranks, 2 * rank.params.bytes());
    Context ctx{Device{}};
    ParamStore turns(Device{}, DType::kF64, rank.params.table(), ranks, GradientMemory::kTurns);
    int64_t shared = 0;
    for (int bucket = 0; bucket < turns.buckets(); ++bucket) {
      if (!turns.SharingGrads(bucket).empty()) shared += turns.BucketValues(bucket).bytes();
    }
    EXPECT_GT(shared, 0);
    const ShardedAdamW optimizer(ctx, SmallOptim(1), SmallSpec(), turns, rank.groups);
    EXPECT_EQ(optimizer.state_bytes() * ranks, 2 * turns.bytes() + shared);
  });
}

}  // namespace
}  // namespace annulus::testing
