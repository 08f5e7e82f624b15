// AdamW sharded over loopback ranks against plain AdamW over whole parameters, and its state through
// checkpoints.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>

#include "annulus/base/random.h"
#include "annulus/train/optimizer.h"
#include "support/loopback.h"
#include "support/optimizer_step.h"

namespace annulus::testing {
namespace {

using Tensors = std::map<std::string, std::vector<double>>;

OptimSpec SmallOptim(double clip_norm) {
  OptimSpec spec;
  spec.beta1 = 0.8, spec.beta2 = 0.9, spec.eps = 1e-3;  // large, so that a misplaced epsilon shows
  spec.weight_decay = 0.3;
  spec.clip_norm = clip_norm;
  return spec;
}

constexpr double kLr = 0.05;

// Gradient of one parameter's element at a step, on a rank of a group.
double GradientAt(const std::string& name, int64_t i, int64_t step, int rank) {
  const RandomStream random(static_cast<uint64_t>(step), absl::StrCat(name, "/", rank));
  return random.Normal(static_cast<uint64_t>(i));
}

// Fills this rank's gradients; the padding stays zero.
template <typename Fn>
void FillGradients(ParamStore& params, Fn&& gradient) {
  for (const ParamInfo& info : params.table().params) {
    const TensorRef grad = params.Grad(params.table().IndexOf(info.name));
    for (int64_t i = 0; i < grad.elements(); ++i) grad.data<double>()[i] = gradient(info.name, i);
  }
}

Tensors ValuesOf(const ParamStore& params) {
  Tensors values;
  for (const ParamInfo& info : params.table().params) {
    const TensorRef value = params.Value(params.table().IndexOf(info.name));
    values[info.name] = std::vector<double>(value.data<double>(), value.data<double>() + value.elements());
  }
  return values;
}

struct Rank {
  ParamStore& params;
  ShardedAdamW& optimizer;
  Context& ctx;
  Communicator group;
  double clip_norm;

  double FinishStep(int64_t step) {
    return testing::FinishStep(ctx, optimizer,
                               {.group = group, .clip_norm = clip_norm, .step = step, .lr = kLr});
  }
};

// One group under test. Every member runs `body(rank)`.
template <typename Body>
void OnGroup(int ranks, const OptimSpec& spec, Body&& body) {
  OnLoopback(ranks, [&](Communicator group) {
    ParamStore params(Device{}, DType::kF64, BuildParamTable(SmallDecoder()), ranks);
    params.Initialize(9);
    Context ctx{Device{}};
    ShardedAdamW optimizer(ctx, spec, params, group);
    Rank rank{params, optimizer, ctx, group, spec.clip_norm};
    body(rank);
  });
}

// One step from the gradients in `params`; returns their norm.
double TakeStep(Rank& rank, int64_t step) {
  for (int bucket = 0; bucket < rank.params.buckets(); ++bucket) {
    ANNULUS_CHECK_OK(rank.optimizer.StartReduce(bucket));
  }
  return rank.FinishStep(step);
}

// Algorithm 2 of Loshchilov and Hutter (2019) on whole tensors, in long double.
class NaiveAdamW {
 public:
  explicit NaiveAdamW(const OptimSpec& spec)
      : spec_(spec), params_(Device{}, DType::kF64, BuildParamTable(SmallDecoder()), 1) {
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

class ShardedAdamWTest : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, ShardedAdamWTest, ::testing::Range(1, 5));

// Gradients have norms near 22 sqrt(ranks): a clip of 1 always acts, one of 1000 never.
TEST_P(ShardedAdamWTest, EqualsPlainAdamW) {
  const int ranks = GetParam();
  for (const double clip_norm : {0.0, 1.0, 1000.0}) {
    SCOPED_TRACE(clip_norm);
    const OptimSpec spec = SmallOptim(clip_norm);
    NaiveAdamW naive(spec);
    std::vector<double> norms;
    for (int64_t step = 1; step <= 6; ++step) norms.push_back(naive.Step(step, ranks));
    OnGroup(ranks, spec, [&](Rank& rank) {
      for (int64_t step = 1; step <= 6; ++step) {
        FillGradients(rank.params, [&](const std::string& name, int64_t i) {
          return GradientAt(name, i, step, rank.group.rank());
        });
        const double norm = TakeStep(rank, step);
        EXPECT_NEAR(norm, norms[static_cast<size_t>(step - 1)], 1e-12 * norm);
      }
      for (const auto& [name, values] : ValuesOf(rank.params)) {
        const std::vector<long double>& expected = naive.values().at(name);
        for (size_t i = 0; i < values.size(); ++i) {
          ASSERT_NEAR(values[i], static_cast<double>(expected[i]), 1e-12) << name << " at " << i;
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
      for (int64_t i = rank.params.table().bucket_elements[static_cast<size_t>(bucket)];
           i < values.elements(); ++i) {
        EXPECT_EQ(values.data<double>()[i], 0) << "padding of bucket " << bucket;
      }
    }
  });
}

// Buckets may be reduced in any order that the ranks share, polled or not: not a bit depends on it.
TEST_P(ShardedAdamWTest, OrderOfReductionsDoesNotMatter) {
  std::vector<Tensors> results;
  for (const std::vector<int>& order : {std::vector{0, 1, 2, 3}, {3, 2, 1, 0}, {2, 0, 3, 1}}) {
    Tensors result;
    OnGroup(GetParam(), SmallOptim(1), [&](Rank& rank) {
      for (int64_t step = 1; step <= 3; ++step) {
        FillGradients(rank.params, [&](const std::string& name, int64_t i) {
          return GradientAt(name, i, step, rank.group.rank());
        });
        for (int bucket : order) {
          ANNULUS_CHECK_OK(rank.optimizer.StartReduce(bucket));
          if (step == 2) rank.optimizer.Poll();
        }
        rank.FinishStep(step);
      }
      if (rank.group.rank() == 0) result = ValuesOf(rank.params);
    });
    results.push_back(std::move(result));
  }
  EXPECT_EQ(results[1], results[0]);
  EXPECT_EQ(results[2], results[0]);
}

// Buckets whose gradients take turns in memory, reduced as a backward pass completes them: the same bits.
TEST_P(ShardedAdamWTest, GradientsThatShareMemoryGiveTheSameUpdate) {
  std::vector<Tensors> results;
  for (const GradientMemory memory : {GradientMemory::kAll, GradientMemory::kTurns}) {
    Tensors result;
    OnLoopback(GetParam(), [&](Communicator group) {
      ParamStore params(Device{}, DType::kF64, BuildParamTable(SmallDecoder(4)), group.size(), memory);
      Context ctx{Device{}};
      const OptimSpec spec = SmallOptim(1);
      ShardedAdamW optimizer(ctx, spec, params, group);
      ANNULUS_CHECK_OK(optimizer.Initialize(9));
      for (int64_t step = 1; step <= 3; ++step) {
        ReduceBackward(params, optimizer, [&](int bucket) {
          for (const ParamInfo& info : params.table().params) {
            if (info.bucket != bucket) continue;
            const TensorRef grad = params.Grad(params.table().IndexOf(info.name));
            for (int64_t i = 0; i < grad.elements(); ++i) {
              grad.data<double>()[i] += GradientAt(info.name, i, step, group.rank());
            }
          }
        });
        FinishStep(ctx, optimizer, {.group = group, .clip_norm = spec.clip_norm, .step = step, .lr = kLr});
      }
      if (group.rank() == 0) result = ValuesOf(params);
    });
    results.push_back(std::move(result));
  }
  EXPECT_EQ(results[1], results[0]);
}

// m and v; gradients are reduced in place, but where another bucket's come to lie in the same memory.
TEST_P(ShardedAdamWTest, HoldsItsShareOfTheState) {
  const int ranks = GetParam();
  OnGroup(ranks, SmallOptim(1), [&](Rank& rank) {
    EXPECT_EQ(rank.optimizer.state_bytes() * ranks, 2 * rank.params.bytes());
    Context ctx{Device{}};
    ParamStore turns(Device{}, DType::kF64, BuildParamTable(SmallDecoder()), ranks, GradientMemory::kTurns);
    int64_t shared = 0;
    for (int bucket = 0; bucket < turns.buckets(); ++bucket) {
      if (!turns.SharingGrads(bucket).empty()) shared += turns.BucketValues(bucket).bytes();
    }
    EXPECT_GT(shared, 0);
    const ShardedAdamW optimizer(ctx, SmallOptim(1), turns, rank.group);
    EXPECT_EQ(optimizer.state_bytes() * ranks, 2 * turns.bytes() + shared);
  });
}

// Everything that the ranks of a group would write into a checkpoint.
class Saved {
 public:
  void Add(const GatheredTensors& gathered) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const NamedTensor& named : gathered.tensors) {
      const double* data = named.tensor.data<double>();
      const bool added =
          tensors_.emplace(named.name, std::vector<double>(data, data + named.tensor.elements())).second;
      EXPECT_TRUE(added) << named.name << " is written twice";
      shapes_[named.name] = named.tensor.shape();
    }
  }
  absl::StatusOr<ConstTensorRef> Find(absl::string_view name) const {
    const auto found = tensors_.find(std::string(name));
    if (found == tensors_.end()) return absl::NotFoundError(name);
    return ConstTensorRef(found->second.data(), DType::kF64, Device{}, shapes_.at(found->first));
  }
  TensorFinder finder() const {
    return [this](absl::string_view name) { return Find(name); };
  }
  const Tensors& tensors() const { return tensors_; }
  void Erase(const std::string& name) { tensors_.erase(name); }
  void Reshape(const std::string& name, Shape shape) { shapes_[name] = shape; }

 private:
  std::mutex mutex_;
  Tensors tensors_;
  std::map<std::string, Shape> shapes_;
};

// The same sum of gradients, to the bit, for any number of ranks.
void FillOnRankZero(ParamStore& params, int64_t step, int rank) {
  FillGradients(params, [&](const std::string& name, int64_t i) {
    return rank == 0 ? GradientAt(name, i, step, 0) : 0.0;
  });
}

// Steps 1..steps from the start, then what a checkpoint holds.
void TrainAndSave(int ranks, int64_t steps, Saved* saved) {
  OnGroup(ranks, SmallOptim(0), [&](Rank& rank) {
    for (int64_t step = 1; step <= steps; ++step) {
      FillOnRankZero(rank.params, step, rank.group.rank());
      TakeStep(rank, step);
    }
    saved->Add(rank.optimizer.Gather().value());
  });
}

// Pieces of one element of every rank, pieces that do not divide the buckets, and all at once: the same bits,
// through no more memory than was allowed.
TEST_P(ShardedAdamWTest, GathersInPiecesOfAnySize) {
  const int ranks = GetParam();
  Tensors whole;
  for (const int64_t piece_bytes : {int64_t{1} << 20, int64_t{1}, int64_t{500}, int64_t{1000}}) {
    SCOPED_TRACE(::testing::Message() << piece_bytes << " bytes");
    Saved saved;
    OnGroup(ranks, SmallOptim(0), [&](Rank& rank) {
      saved.Add(rank.optimizer.Gather(piece_bytes).value());
      const int64_t rounded = (piece_bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
      EXPECT_LE(rank.ctx.scratch.high_water_bytes(), rounded);
      EXPECT_EQ(rank.ctx.scratch.used_bytes(), 0);
    });
    if (whole.empty()) whole = saved.tensors();
    EXPECT_EQ(saved.tensors(), whole);
  }
  ParamStore params(Device{}, DType::kF64, BuildParamTable(SmallDecoder()), 1);
  params.Initialize(9);
  for (const auto& [name, values] : ValuesOf(params)) EXPECT_EQ(values, whole.at(name)) << name;
}

TEST_P(ShardedAdamWTest, StateMovesBetweenGroupSizesBitForBit) {
  const int from = GetParam();
  Saved saved, straight;
  TrainAndSave(from, 3, &saved);
  TrainAndSave(from, 5, &straight);
  EXPECT_EQ(saved.tensors().size(), 3 * BuildParamTable(SmallDecoder()).params.size());
  EXPECT_NE(saved.tensors(), straight.tensors());
  for (int to = 1; to <= 4; ++to) {
    SCOPED_TRACE(::testing::Message() << from << " -> " << to << " ranks");
    Saved again, continued;
    OnGroup(to, SmallOptim(0), [&](Rank& rank) {
      FillOnRankZero(rank.params, 77, rank.group.rank());
      TakeStep(rank, 1);  // something else in parameters and state, to be replaced
      ANNULUS_CHECK_OK(rank.optimizer.Restore(saved.finder()));
      ANNULUS_CHECK_OK(rank.optimizer.PublishParameters());
      again.Add(rank.optimizer.Gather().value());
      for (int64_t step = 4; step <= 5; ++step) {
        FillOnRankZero(rank.params, step, rank.group.rank());
        TakeStep(rank, step);
      }
      continued.Add(rank.optimizer.Gather().value());
    });
    EXPECT_EQ(again.tensors(), saved.tensors());
    EXPECT_EQ(continued.tensors(), straight.tensors());
  }
}

TEST(Restore, NamesTheTensorThatDoesNotFit) {
  const auto restore = [](const Saved& saved) {
    absl::Status status;
    OnGroup(1, SmallOptim(0), [&](Rank& rank) { status = rank.optimizer.Restore(saved.finder()); });
    return status;
  };
  Saved missing, reshaped, reshaped_state;
  for (Saved* saved : {&missing, &reshaped, &reshaped_state}) TrainAndSave(2, 1, saved);
  EXPECT_TRUE(restore(missing).ok());
  missing.Erase("optim.v.layers.0.norm.weight");
  EXPECT_EQ(restore(missing), absl::NotFoundError("optim.v.layers.0.norm.weight"));
  reshaped.Reshape("embed.weight", {5, 11});
  EXPECT_EQ(restore(reshaped).message(),
            "checkpoint tensor embed.weight: is f64 [5, 11], expected f64 [11, 5]");
  reshaped_state.Reshape("optim.m.embed.weight", {55});
  EXPECT_EQ(restore(reshaped_state).message(),
            "checkpoint tensor optim.m.embed.weight: is f64 [55], expected f64 [11, 5]");
}

TEST(Restore, ParametersAloneForAnyUse) {
  Saved saved;
  TrainAndSave(3, 2, &saved);
  Context ctx{Device{}};
  ParamStore params(Device{}, DType::kF64, BuildParamTable(SmallDecoder()), 1);
  ANNULUS_CHECK_OK(RestoreParameters(ctx, params, saved.finder()));
  for (const auto& [name, values] : ValuesOf(params)) EXPECT_EQ(values, saved.tensors().at(name)) << name;
  ParamStore f32(Device{}, DType::kF32, BuildParamTable(SmallDecoder()), 1);
  EXPECT_EQ(RestoreParameters(ctx, f32, saved.finder()).message(),
            "checkpoint tensor embed.weight: is f64 [11, 5], expected f32 [11, 5]");
}

}  // namespace
}  // namespace annulus::testing
