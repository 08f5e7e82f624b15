// Accuracy of an evaluation against a count of whole sequences on one rank, token by token.

#include <algorithm>

#include "trainer/trainer_testing.h"

namespace annulus::testing {
namespace {

// Some steps of training on recall of keys among few tokens, so that some targets are met and some are not.
RunSpec RecallRun(const std::vector<std::string>& more = {}) {
  constexpr char kRun[] = R"(name: "recall"
    seed: 3 compute: F64 device: CPU
    model { pattern: "A A" d_model: 8 vocab_size: 12 attention { heads: 2 } }
    data {
      recall { task { length: 13 pairs: 3 } task { length: 9 pairs: 1 } validation_sequences: 11 }
      seq_len: 15
    }
    optim { adamw { lr: 1e-2 } steps: 20 sequences_per_step: 12 micro_batch: 2 }
    eval { accuracy: true })";
  absl::StatusOr<ResolvedConfig> config = LoadConfig("recall.textproto", kRun, more);
  ANNULUS_CHECK(config.ok()) << config.status();
  return config->spec;
}

void TrainSteps(const RankOfRun& rank, const RunSpec& spec, int steps) {
  for (int i = 0; i < steps; ++i) {
    const absl::StatusOr<Batch> batch = LoadBatch(rank.data, spec, rank.trainer.layout(), rank.trainer.step(),
                                                  rank.mesh.at.dp, rank.mesh.shape.dp, rank.mesh.at.cp);
    ANNULUS_CHECK(batch.ok()) << batch.status();
    ANNULUS_CHECK_OK(rank.trainer.Step(*batch, 0).status());
  }
}

// Of the parameters of one rank that holds all, over the first `sequences` of the validation split.
double CountedAccuracy(const RunSpec& spec, const RankOfRun& rank, int64_t sequences) {
  Context ctx{Device{}};
  Decoder decoder(spec.model, spec.recompute, rank.trainer.params());
  int64_t hits = 0, counted = 0;
  for (int64_t n = 0; n < sequences; ++n) {
    const Sequence sequence = rank.data.Validation(n).value();
    const int64_t length = sequence.length;
    AttentionGeometry geometry(SequenceLayout(LayoutKind::kContiguous, length, 1), MakeLoopbackGroup(1)[0]);
    geometry.SetBatch({.batch = 1, .lengths = {length}, .document_starts = {}});
    ModelStep step{.geometry = geometry};
    std::vector<int32_t> tokens = sequence.tokens;
    const Tensor logits(Device{}, DType::kF64, {length, spec.model.vocab_size});
    ANNULUS_CHECK_OK(decoder.Logits(ctx, step, TensorRef(tokens.data(), DType::kI32, Device{}, {length}), 0,
                                    logits.ref()));
    for (int64_t t = 0; t < length; ++t) {
      const int32_t target = sequence.targets[static_cast<size_t>(t)];
      if (target == kIgnoredTarget) continue;
      const double* row = logits.ref().data<double>() + t * spec.model.vocab_size;
      ++counted;
      hits += std::max_element(row, row + spec.model.vocab_size) - row == target;
    }
  }
  return static_cast<double>(hits) / static_cast<double>(counted);
}

double AccuracyOn(const RunSpec& spec, const MeshShape& shape, int steps) {
  std::vector<double> accuracy(static_cast<size_t>(shape.world()));
  OnMesh(spec, shape, [&](RankOfRun rank) {
    TrainSteps(rank, spec, steps);
    const absl::StatusOr<Evaluation> got = rank.trainer.Evaluate(rank.data);
    ANNULUS_CHECK(got.ok()) << got.status();
    accuracy[static_cast<size_t>(rank.mesh.world.rank())] = got->accuracy.value();
  });
  for (const double each : accuracy) EXPECT_EQ(each, accuracy[0]) << NameOf(shape);
  return accuracy[0];
}

TEST(Accuracy, IsThatOfADirectCount) {
  const RunSpec spec = RecallRun();
  OnMesh(spec, {}, [&](RankOfRun rank) {
    TrainSteps(rank, spec, 15);
    const double got = rank.trainer.Evaluate(rank.data)->accuracy.value();
    EXPECT_EQ(got, CountedAccuracy(spec, rank, 11));
    EXPECT_GT(got, 0.1);
    EXPECT_LT(got, 0.9);
  });
}

TEST(Accuracy, IsTheSameOnEveryMesh) {
  for (const char* sequences : {"0", "3"}) {
    const RunSpec spec = RecallRun({absl::StrCat("eval.sequences=", sequences), "model.pattern=meta=2 A M",
                                    "model.mamba={heads: 2 head_dim: 4 state: 4 chunk: 4}"});
    const double want = AccuracyOn(spec, {}, 15);
    EXPECT_GT(want, 0);
    for (const MeshShape& shape : {MeshShape{.cp = 2},
                                   {.cp = 3},
                                   {.dp = 2},
                                   {.dp = 2, .cp = 2},
                                   {.tp = 2},
                                   {.dp = 2, .cp = 2, .tp = 2}}) {
      EXPECT_EQ(AccuracyOn(spec, shape, 15), want) << NameOf(shape);
    }
  }
}

// All logits of a model whose parameters are zero are equal: none of them is a choice.
TEST(Accuracy, OfAModelThatPrefersNothingIsZero) {
  EXPECT_EQ(AccuracyOn(RecallRun({"model.init_stddev=0"}), {}, 0), 0);
}

TEST(Accuracy, IsCountedOnlyWhereAskedFor) {
  OnMesh(RecallRun({"eval.accuracy=false"}), {},
         [&](RankOfRun rank) { EXPECT_FALSE(rank.trainer.Evaluate(rank.data)->accuracy.has_value()); });
}

}  // namespace
}  // namespace annulus::testing
