// Optimizer state through checkpoints, between any two meshes.

#include <mutex>

#include "optim/optimizer_testing.h"

namespace annulus::testing {
namespace {

class OptimizerState : public ::testing::TestWithParam<Mesh> {};
INSTANTIATE_TEST_SUITE_P(Ranks, OptimizerState, ::testing::ValuesIn(kMeshes));

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

// The same sum of gradients, to the bit, for any mesh.
void FillOnRankZero(Rank& rank, int64_t step) {
  ZeroGradients(rank.params);
  AddGradients(rank.params, rank.groups.tensor, -1, 0, [&](const std::string& name, int64_t i) {
    return rank.shard() == 0 ? GradientAt(name, i, step, 0) : 0.0;
  });
}

// Steps 1..steps from the start, then what a checkpoint holds.
void TrainAndSave(const Mesh& mesh, int64_t steps, Saved* saved) {
  OnGroup(mesh, SmallOptim(0), [&](Rank& rank) {
    for (int64_t step = 1; step <= steps; ++step) {
      FillOnRankZero(rank, step);
      TakeStep(rank, step);
    }
    saved->Add(rank.optimizer.Gather().value());
  });
}

// Pieces of one element of every rank, pieces that do not divide the buckets, and all at once: the same bits,
// through no more memory than was allowed.
TEST_P(OptimizerState, GathersInPiecesOfAnySize) {
  Tensors whole;
  for (const int64_t piece_bytes : {int64_t{1} << 20, int64_t{1}, int64_t{500}, int64_t{1000}}) {
    SCOPED_TRACE(::testing::Message() << piece_bytes << " bytes");
    Saved saved;
    OnGroup(GetParam(), SmallOptim(0), [&](Rank& rank) {
      saved.Add(rank.optimizer.Gather(piece_bytes).value());
      const int64_t rounded = (piece_bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
      EXPECT_LE(rank.ctx.scratch.high_water_bytes(), rounded);
      EXPECT_EQ(rank.ctx.scratch.used_bytes(), 0);
    });
    if (whole.empty()) whole = saved.tensors();
    EXPECT_EQ(saved.tensors(), whole);
  }
  ParamStore params(Device{}, DType::kF64, BuildParamTable(SmallSpec()), 1);
  params.Initialize(9);
  for (const auto& [name, values] : ValuesOf(params)) EXPECT_EQ(values, whole.at(name)) << name;
}

TEST_P(OptimizerState, StateMovesBetweenMeshesBitForBit) {
  const Mesh from = GetParam();
  Saved saved, straight;
  TrainAndSave(from, 3, &saved);
  TrainAndSave(from, 5, &straight);
  EXPECT_EQ(saved.tensors().size(), 3 * BuildParamTable(SmallSpec()).params.size());
  EXPECT_NE(saved.tensors(), straight.tensors());
  for (const Mesh& to : kMeshes) {
    SCOPED_TRACE(::testing::PrintToString(from) + " -> " + ::testing::PrintToString(to));
    Saved again, continued;
    OnGroup(to, SmallOptim(0), [&](Rank& rank) {
      FillOnRankZero(rank, 77);
      TakeStep(rank, 1);  // something else in parameters and state, to be replaced
      ANNULUS_CHECK_OK(rank.optimizer.Restore(saved.finder()));
      ANNULUS_CHECK_OK(rank.optimizer.PublishParameters());
      again.Add(rank.optimizer.Gather().value());
      for (int64_t step = 4; step <= 5; ++step) {
        FillOnRankZero(rank, step);
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
    OnGroup({1, 1}, SmallOptim(0), [&](Rank& rank) { status = rank.optimizer.Restore(saved.finder()); });
    return status;
  };
  Saved missing, reshaped, reshaped_state;
  for (Saved* saved : {&missing, &reshaped, &reshaped_state}) TrainAndSave({2, 1}, 1, saved);
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
  TrainAndSave({3, 2}, 2, &saved);
  Context ctx{Device{}};
  ParamStore params(Device{}, DType::kF64, BuildParamTable(SmallSpec()), 1);
  ANNULUS_CHECK_OK(RestoreParameters(ctx, params, saved.finder()));
  for (const auto& [name, values] : ValuesOf(params)) EXPECT_EQ(values, saved.tensors().at(name)) << name;
  ParamStore f32(Device{}, DType::kF32, BuildParamTable(SmallSpec()), 1);
  EXPECT_EQ(RestoreParameters(ctx, f32, saved.finder()).message(),
            "checkpoint tensor embed.weight: is f64 [11, 5], expected f32 [11, 5]");
}

}  // namespace
}  // namespace annulus::testing
