// Attention over loopback ranks against a dense softmax over the whole sequence, in f64: the default plan,
// and what a geometry keeps and makes anew.

#include "annulus/parallel/context_attention.h"

#include "parallel/attention_layer.h"

namespace annulus::testing {
namespace {

// Dims differ: neither may stand for the other.
ContextAttentionShape ShapeOf(int64_t window) {
  return {.heads = 4, .kv_heads = 2, .head_dim = 4, .v_head_dim = 6, .window = window, .scale = 0.4};
}

struct MaskKind {
  const char* name;
  int64_t window;
  Documents documents;
  Lengths lengths;
  Visibility visibility = Visibility::kCausal;
};
constexpr MaskKind kMasks[] = {
    {"causal", 0, Documents::kNone, Lengths::kFull},
    {"window", 5, Documents::kNone, Lengths::kFull},
    {"window_of_one", 1, Documents::kNone, Lengths::kFull},
    {"documents", 0, Documents::kRandom, Lengths::kFull},
    {"mixed_with_padding", 9, Documents::kRandom, Lengths::kRandom},
    {"full", 0, Documents::kNone, Lengths::kFull, Visibility::kFull},
    {"mixed_both_ways", 9, Documents::kRandom, Lengths::kRandom, Visibility::kFull}};

class ContextAttention : public ::testing::TestWithParam<std::tuple<LayoutKind, int>> {};

INSTANTIATE_TEST_SUITE_P(LayoutsAndRanks, ContextAttention,
                         ::testing::Combine(::testing::ValuesIn(kLayouts), ::testing::Range(1, 9)),
                         [](const auto& info) {
                           return NameOf(std::get<0>(info.param)) + std::to_string(std::get<1>(info.param));
                         });

TEST_P(ContextAttention, EqualsDenseSoftmax) {
  const auto [kind, ranks] = GetParam();
  for (const MaskKind& mask : kMasks) {
    for (const auto& [length, batch] : {std::pair{32, 1}, std::pair{37, 2}, std::pair{11, 3}}) {
      SCOPED_TRACE(::testing::Message() << mask.name << ", length " << length << ", batch " << batch);
      const uint64_t seed = static_cast<uint64_t>(length + batch);
      LayerCase c{SequenceLayout(kind, length, ranks),
                  RandomSequences(seed, length, batch, mask.lengths, mask.documents), ShapeOf(mask.window)};
      c.sequences.visibility = mask.visibility;
      const WholeLayer<double> in = MakeInputs<double>(c);
      ExpectSameLayer(RunLayer(c, in), DenseLayer(c, in));
    }
  }
}

// What was prepared for all layers of a batch is what its layers then find, and those of batches like it.
TEST(Geometry, PreparesAllLayersOfABatch) {
  OnLoopback(2, [](Communicator cp) {
    Context ctx{Device{}};
    const SequenceLayout layout(LayoutKind::kZigzag, 29, 2);
    for (const Documents documents : {Documents::kNone, Documents::kRandom}) {
      AttentionGeometry geometry(layout, cp);
      const SequenceBatch sequences = RandomSequences(1, 29, 2, Lengths::kFull, documents);
      geometry.SetBatch(sequences);
      std::vector<AttentionCase> layers;
      for (const int64_t window : {0, 4}) {
        const ContextAttentionShape shape = ShapeOf(window);
        layers.push_back({.layout = layout,
                          .sequences = sequences,
                          .heads = shape.heads,
                          .kv_heads = shape.kv_heads,
                          .head_dim = shape.head_dim,
                          .v_head_dim = shape.v_head_dim,
                          .window = window,
                          .dtype = DType::kF64});
      }
      ASSERT_TRUE(geometry.Prepare(ctx, layers).ok());
      EXPECT_EQ(geometry.schedules().size(), 4u);
      geometry.SetBatch(sequences);
      for (const AttentionCase& layer : layers) {
        for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
          const auto* kept = geometry.FindSchedule(layer, pass);
          EXPECT_EQ(kept != nullptr, documents == Documents::kNone) << "documents are planned anew";
          const auto* used = geometry.ScheduleFor(ctx, ShapeOf(layer.window), DType::kF64, pass).value();
          EXPECT_TRUE(kept == nullptr || used == kept);
        }
      }
    }
  });
}

// One geometry serves layers of several windows and batches of several document structures.
TEST(Geometry, FollowsTheBatchAndTheWindow) {
  const SequenceLayout layout(LayoutKind::kZigzag, 29, 3);
  std::vector<LayerCase> cases;
  for (const uint64_t seed : {1, 2}) {
    for (const int64_t window : {0, 4}) {
      cases.push_back(
          {layout, RandomSequences(seed, 29, 2, Lengths::kRandom, Documents::kRandom), ShapeOf(window)});
    }
  }
  // Of the same size, then with other lengths, documents, none again, and another batch.
  const auto add = [&](int64_t batch, Lengths lengths, Documents documents) {
    cases.push_back({layout, RandomSequences(3, 29, batch, lengths, documents), ShapeOf(4)});
  };
  add(2, Lengths::kFull, Documents::kNone);
  add(2, Lengths::kRandom, Documents::kNone);
  add(2, Lengths::kFull, Documents::kNone);
  add(2, Lengths::kFull, Documents::kRandom);
  add(2, Lengths::kFull, Documents::kNone);
  add(1, Lengths::kFull, Documents::kNone);
  add(1, Lengths::kFull, Documents::kNone);
  cases.back().sequences.visibility = Visibility::kFull;
  std::vector<WholeLayer<double>> in, got;
  for (const LayerCase& c : cases) {
    in.push_back(MakeInputs<double>(c));
    got.push_back(MakeOutputs<double>(c));
  }
  OnLoopback(3, [&](Communicator cp) {
    AttentionGeometry geometry(layout, cp);
    for (size_t i = 0; i < cases.size(); ++i) {
      geometry.SetBatch(cases[i].sequences);
      RunRank(cases[i], in[i], geometry, &got[i]);
    }
  });
  for (size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(::testing::Message() << "case " << i);
    ExpectSameLayer(got[i], DenseLayer(cases[i], in[i]));
  }
}

TEST(Geometry, KeepsSchedulesWhileTheMasksStay) {
  const SequenceBatch sequences = RandomSequences(1, 20, 2, Lengths::kFull, Documents::kNone);
  OnLoopback(2, [&](Communicator cp) {
    Context ctx{Device{}};
    AttentionGeometry geometry(SequenceLayout(LayoutKind::kStriped, 20, 2), cp);
    geometry.SetBatch(sequences);
    const auto schedule = [&](int64_t window, Pass pass) {
      return geometry.ScheduleFor(ctx, ShapeOf(window), DType::kF64, pass).value();
    };
    const AttentionGeometry::Schedule* all = schedule(0, Pass::kForward);
    const AttentionGeometry::Schedule* window = schedule(3, Pass::kForward);
    EXPECT_NE(all->plan.problem.pairs, window->plan.problem.pairs);
    EXPECT_EQ(schedule(3, Pass::kBackward)->plan.pass, Pass::kBackward);
    geometry.SetBatch(sequences);
    EXPECT_EQ(schedule(0, Pass::kForward), all);
    EXPECT_EQ(schedule(3, Pass::kForward), window);
    EXPECT_EQ(geometry.schedules().size(), 3u);
  });
}

absl::StatusCode CodeOfSchedule(const SequenceBatch& sequences, Communicator cp,
                                const ExchangeOptions& options) {
  Context ctx{Device{}};
  AttentionGeometry geometry(SequenceLayout(LayoutKind::kZigzag, 18, 3), cp, options);
  geometry.SetBatch(sequences);
  return geometry.ScheduleFor(ctx, ShapeOf(0), DType::kF64, Pass::kForward).status().code();
}

TEST(Geometry, RanksThatDisagreeAreTold) {
  OnLoopback(3, [&](Communicator cp) {
    const bool other = cp.rank() == 1;
    const SequenceBatch whole{.batch = 1, .lengths = {18}, .document_starts = {}},
        shorter{.batch = 1, .lengths = {9}, .document_starts = {}};
    EXPECT_EQ(CodeOfSchedule(other ? shorter : whole, cp, {}), absl::StatusCode::kInvalidArgument);
    const PlanChoice token_ring{.kind = PlanKind::kTokenRing};
    EXPECT_EQ(CodeOfSchedule(whole, cp, {.forward = {other ? token_ring : PlanChoice{}}}),
              absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(CodeOfSchedule(whole, cp, {.transport = other ? TransportKind::kHost : TransportKind::kNccl}),
              absl::StatusCode::kInvalidArgument);
  });
}

TEST(Geometry, RefusesPlansThatCannotBe) {
  OnLoopback(3, [&](Communicator cp) {
    const SequenceBatch sequences{.batch = 1, .lengths = {18}, .document_starts = {}};
    const PlanChoice uneven{.head_split = 2};
    EXPECT_EQ(CodeOfSchedule(sequences, cp, {.forward = {uneven}}), absl::StatusCode::kInvalidArgument);
    // On one rank only; and where nothing that may be chosen fits into memory.
    EXPECT_EQ(CodeOfSchedule(sequences, cp, {.forward = {cp.rank() == 2 ? uneven : PlanChoice{}}}),
              absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(CodeOfSchedule(sequences, cp, {.machine = AssumedCpuCore(), .buffer_bytes = 1}),
              absl::StatusCode::kResourceExhausted);
  });
}

// Where the machine is known the fastest of what is left to choose is chosen, for each pass, and stays chosen
// while documents change.
TEST(Geometry, ChoosesByPredictedTime) {
  OnLoopback(4, [&](Communicator cp) {
    Context ctx{Device{}};
    ExchangeOptions options{.forward = {{.kind = PlanKind::kTokenRing}, {.kind = PlanKind::kDirectCast}},
                            .machine = AssumedCpuCore()};
    AttentionGeometry geometry(SequenceLayout(LayoutKind::kZigzag, 256, 4), cp, options);
    ContextAttentionShape shape = ShapeOf(0);
    shape.kv_heads = 1;  // KV is a quarter of Q: it is what should move
    std::vector<uint64_t> hashes;
    for (const uint64_t seed : {1, 2}) {
      geometry.SetBatch(RandomSequences(seed, 256, 1, Lengths::kFull, Documents::kRandom));
      const AttentionGeometry::Schedule* forward =
          geometry.ScheduleFor(ctx, shape, DType::kF64, Pass::kForward).value();
      EXPECT_EQ(forward->choice.plan.kind, PlanKind::kDirectCast);
      ASSERT_TRUE(forward->choice.predicted.has_value());
      EXPECT_GT(forward->choice.predicted->seconds, 0);
      EXPECT_NE(forward->choice.why.find("token_ring"), std::string::npos) << forward->choice.why;
      hashes.push_back(HashOf(forward->plan));
      const AttentionGeometry::Schedule* backward =
          geometry.ScheduleFor(ctx, shape, DType::kF64, Pass::kBackward).value();
      EXPECT_TRUE(backward->choice.predicted.has_value());
    }
    EXPECT_NE(hashes[0], hashes[1]);
  });
}

}  // namespace
}  // namespace annulus::testing
