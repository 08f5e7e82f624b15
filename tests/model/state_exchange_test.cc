// What state-space layers are said to send against what they send.

#include <gtest/gtest.h>

#include "annulus/model/cost.h"
#include "model/named_specs.h"

namespace annulus::testing {
namespace {

struct Sent {
  double forward = 0, backward = 0;  // of the rank with most
};

Sent Counted(const ModelSpec& spec, int64_t length, const MeshRun& run) {
  Sent sent;
  const WholeBatch batch = RandomBatch(spec, {.length = length, .batch = 2});
  OnMesh(spec, batch, run, [&](RankModel& model) {
    model.Loss();
    const auto forward = static_cast<double>(model.bytes_sent());
    model.LossAndGradients();
    const double backward = static_cast<double>(model.bytes_sent()) - forward;
    Communicator world = model.mesh().world;
    const Sent most{.forward = world.AllReduceValue(forward, ReduceOp::kMax).value(),
                    .backward = world.AllReduceValue(backward, ReduceOp::kMax).value()};
    if (world.rank() == 0) sent = most;
  });
  return sent;
}

double Predicted(const ModelSpec& spec, BranchKind kind, StateOrder order, int64_t length,
                 const MeshRun& run) {
  const StateExchange exchange = StateExchangeOf(spec, kind, order,
                                                 {.layout = SequenceLayout(run.layout, length, run.cp),
                                                  .sequences = 2,
                                                  .tp = run.tp,
                                                  .dtype = run.dtype});
  return static_cast<double>(exchange.state_bytes + exchange.halo_bytes);
}

class StateKinds : public ::testing::TestWithParam<BranchKind> {};
INSTANTIATE_TEST_SUITE_P(Kinds, StateKinds,
                         ::testing::Values(BranchKind::kMamba, BranchKind::kLightning, BranchKind::kBased,
                                           BranchKind::kDeltaNet),
                         [](const auto& info) { return std::string(Name(info.param)); });

// Gathering ranks send as many states each, so that the rank that sends most sends most of both.
TEST_P(StateKinds, SendWhatIsPredictedWhateverTheLength) {
  const ModelSpec spec = WithStates(2, 3, SmallSpec({Recurrent(GetParam())}));
  for (const LayoutKind layout : {LayoutKind::kContiguous, LayoutKind::kZigzag}) {
    for (const auto& [cp, tp] : {std::pair(2, 1), {3, 1}, {2, 2}}) {
      const MeshRun run{.dtype = DType::kF32, .layout = layout, .cp = cp, .tp = tp};
      for (const int64_t length : {64, 192}) {
        SCOPED_TRACE(::testing::Message()
                     << NameOf(layout) << " cp " << cp << " tp " << tp << " length " << length);
        const Sent counted = Counted(spec, length, run);
        EXPECT_EQ(counted.forward, Predicted(spec, GetParam(), StateOrder::kForward, length, run));
        EXPECT_EQ(counted.backward, Predicted(spec, GetParam(), StateOrder::kBackward, length, run));
        EXPECT_EQ(counted.forward, Predicted(spec, GetParam(), StateOrder::kForward, 16 * length, run));
        EXPECT_GT(counted.forward, 0);
      }
    }
  }
}

}  // namespace
}  // namespace annulus::testing
