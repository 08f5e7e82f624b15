// What branches side by side move over a tensor-parallel group, counted: their input is gathered once, and
// where they are summed so is the gradient of their output; and they are summed once.

#include <gtest/gtest.h>

#include <mutex>

#include "annulus/comm/forwarding_backend.h"
#include "model/named_specs.h"

namespace annulus::testing {
namespace {

// Of one rank; sent to or received from others.
struct Moved {
  int64_t gathers = 0, gathered_bytes = 0, sums = 0, summed_bytes = 0;
  bool operator==(const Moved&) const = default;
};
Moved operator-(const Moved& a, const Moved& b) {
  return {a.gathers - b.gathers, a.gathered_bytes - b.gathered_bytes, a.sums - b.sums,
          a.summed_bytes - b.summed_bytes};
}
void PrintTo(const Moved& m, std::ostream* out) {
  *out << m.gathers << " gathers of " << m.gathered_bytes << " bytes, " << m.sums << " sums of "
       << m.summed_bytes << " bytes";
}

class CountingComm : public ForwardingBackend {
 public:
  CountingComm(Communicator inner, Moved* moved) : ForwardingBackend(std::move(inner)), moved_(moved) {}
  absl::StatusOr<Request> AllGather(ConstTensorRef in, TensorRef out) override {
    ++moved_->gathers, moved_->gathered_bytes += out.bytes() - in.bytes();
    return inner().IAllGather(in, out);
  }
  absl::StatusOr<Request> ReduceScatter(ConstTensorRef in, TensorRef out) override {
    ++moved_->sums, moved_->summed_bytes += in.bytes() - out.bytes();
    return inner().IReduceScatter(in, out);
  }
  absl::StatusOr<std::shared_ptr<CommBackend>> Split(int, int) override {
    return absl::UnimplementedError("groups are not split from one that counts");
  }

 private:
  Moved* moved_;
};

constexpr int kTp = 2;
constexpr BatchShape kShape{.length = 24, .batch = 2};

// By the first rank in forward and backward of a model of these layers.
Moved MovedBy(std::vector<LayerSpec> layers) {
  const ModelSpec spec = WithLatents(6, WithStates(2, 3, SmallSpec(std::move(layers))));
  const WholeBatch batch = RandomBatch(spec, kShape);
  Moved first;
  OnLoopback(kTp, [&](Communicator world) {
    ProcessMesh mesh = ProcessMesh::Create({.tp = kTp}, world).value();
    Moved moved;
    mesh.tp = Communicator(std::make_shared<CountingComm>(mesh.tp, &moved));
    Context ctx(Device{});
    RankModel model(spec, batch, {.tp = kTp}, mesh, ctx);
    moved = {};
    model.LossAndGradients();
    if (world.rank() == 0) first = moved;
  });
  return first;
}

// Beside what a model without layers moves, in units of the residual stream.
Moved OfLayer(const LayerSpec& layer) { return MovedBy({layer, Mlp()}) - MovedBy({Mlp()}); }
Moved Streams(int64_t gathers, int64_t sums) {
  const int64_t bytes = kShape.length * kShape.batch / kTp * 16 * SizeOf(DType::kF64);
  return {gathers, gathers * bytes, sums, sums * bytes};
}

const BranchSpec kMamba{.kind = BranchKind::kMamba}, kLightning{.kind = BranchKind::kLightning};

// Forward: its input, and a sum. Backward: its input, the gradient of its output, and a sum.
TEST(BranchesSideBySide, OneMovesThreeGathersAndTwoSums) {
  for (const BranchSpec& branch : {AttentionBranch(0), kMamba, kLightning, MlpBranch()}) {
    EXPECT_EQ(OfLayer(Layer({branch})), Streams(3, 2)) << Name(branch.kind);
  }
}

TEST(BranchesSideBySide, SummedOnesMoveWhatOneDoes) {
  EXPECT_EQ(OfLayer(Layer({kMamba, AttentionBranch(0)})), Streams(3, 2));
  EXPECT_EQ(OfLayer(Layer({MlpBranch(), AttentionBranch(0), kMamba, kLightning})), Streams(3, 2));
}

// Each of them is normalised over the whole width before it is added to the others.
TEST(BranchesSideBySide, NormalisedOnesShareTheirInput) {
  EXPECT_EQ(OfLayer(Layer({kMamba, AttentionBranch(0)}, Combine::kMeanNorm)), Streams(2 + 2, 2 + 1));
}

// Latents are gathered in place of the input.
TEST(BranchesSideBySide, LatentsAreMovedBesides) {
  const BranchSpec latent = Latent(1).branches[0];
  const Moved alone = OfLayer(Layer({latent})), beside = OfLayer(Layer({latent, kMamba}));
  EXPECT_EQ(alone.gathers, 3);
  EXPECT_EQ(beside - alone, Streams(2, 1));
}

}  // namespace
}  // namespace annulus::testing
