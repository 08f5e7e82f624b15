// ranks: 1 2 4
//
// One step of a whole decoder on GPUs against the same step in f64 on a CPU, on meshes of all ranks. Ranks
// have a GPU each, or share.

#include "gpu/gpu_rank.h"

namespace annulus::testing {
namespace {

ModelSpec GpuSpec() {
  return {.d_model = 128,
          .vocab_size = 97,
          .heads = 4,
          .kv_heads = 2,
          .head_dim = 64,
          .d_ff = 208,
          .norm_eps = 1e-5,
          .init_stddev = 0.1,  // attention far from uniform, gates far from linear
          .tied_head = false,
          .layers = {Attention(0, 10000.0), Mlp(), Attention(48, 10000.0), Mlp()}};
}

struct MaskCase {
  const char* name;
  BatchShape batch;
};

// 203 is divided by no number of ranks, so blocks have padding; documents make every block's mask general.
// With 256 and one document, blocks are causal or full but for the window: what cuDNN serves.
const MaskCase kMaskCases[] = {
    {"documents", {.length = 203, .batch = 4, .lengths = Lengths::kRandom, .documents = Documents::kRandom}},
    {"causal", {.length = 256, .batch = 4}}};

const References& ReferencesOf(const MaskCase& mask) {
  static std::map<std::string, References> all;
  const auto found = all.find(mask.name);
  return found != all.end() ? found->second : all.try_emplace(mask.name, GpuSpec(), mask.batch).first->second;
}

constexpr GpuRank::Axis kAxes[] = {GpuRank::Axis::kData, GpuRank::Axis::kContext, GpuRank::Axis::kTensor};
constexpr DType kDTypes[] = {DType::kF32, DType::kBF16};

void OnMasksAndRanks(Determinism determinism, const std::function<void(const References&, GpuRank&)>& fn) {
  for (const GpuRank::Axis axis : kAxes) {
    GpuRank rank(axis, determinism);
    for (const MaskCase& mask : kMaskCases) {
      SCOPED_TRACE(absl::StrCat(rank.Name(), mask.name));
      fn(ReferencesOf(mask), rank);
    }
  }
}

void OnRuns(GpuRank& rank, const std::function<void(const GpuRank::Run&)>& fn) {
  for (const DType dtype : kDTypes) {
    for (const TransportKind transport : rank.Transports()) {
      SCOPED_TRACE(absl::StrCat(Name(dtype), ", transport ", Name(transport)));
      fn({.dtype = dtype, .transport = transport});
    }
  }
}

// Without rounding the naive decoder gives the model's numbers, up to the order of sums. With rounding its
// error over all parameters is that of bf16: a few times its half epsilon, 2^-9.
TEST(NaiveDecoder, IsTheModelRounded) {
  for (const MaskCase& mask : kMaskCases) {
    SCOPED_TRACE(mask.name);
    const References& references = ReferencesOf(mask);
    ExpectSame(TrainRounded(GpuSpec(), references.batch, {.fill = FillForEveryDType}, kNoRounding),
               references.exact, 1e-12);
    const double error = GradientError(references.bf16.front(), references.exact);
    EXPECT_GT(error, std::ldexp(1.0, -9));
    EXPECT_LT(error, 16 * std::ldexp(1.0, -9));
  }
}

// What the rule allows in bf16 hides no mistake: a window of one key less is refused.
TEST(NaiveDecoder, ErrorIsSmallerThanThatOfAWrongWindow) {
  ModelSpec wrong = GpuSpec();
  wrong.layers[2].branches[0].window -= 1;
  for (const MaskCase& mask : kMaskCases) {
    SCOPED_TRACE(mask.name);
    const References& references = ReferencesOf(mask);
    const Outcome outcome = testing::Train(wrong, references.batch, {.fill = FillForEveryDType});
    int refused = 0;
    for (const auto& [name, gradient] : outcome.gradients) {
      refused += !references.WithinRule(DType::kBF16, name, gradient);
    }
    EXPECT_GT(refused, 0);
  }
}

TEST(ModelOnGpu, LossAndEveryGradientFollowTheRule) {
  for (const Determinism determinism : {Determinism::kOff, Determinism::kRequired}) {
    OnMasksAndRanks(determinism, [&](const References& references, GpuRank& rank) {
      OnRuns(rank, [&](const GpuRank::Run& run) {
        rank.With(GpuSpec(), references.batch, run, [&](RankModel& model) {
          ExpectStep(model.Train(), references, run.dtype);
          ExpectLoss(model.Loss(), references, run.dtype);
        });
      });
    });
  }
}

// Partial results of attention are carried in f32, so splitting a sequence costs nothing. A carry in bf16
// would add an error of the size of the whole; 1.25 leaves room for another order of the same sums. Partial
// sums of tensor-parallel ranks are rounded to bf16 before they are added, as is each of log2(ranks) to ranks
// sums of sums: 1.5 for up to four ranks.
TEST(ModelOnGpu, ErrorInBf16DoesNotGrowWithTheRanks) {
  GpuRank data(GpuRank::Axis::kData, Determinism::kOff), context(GpuRank::Axis::kContext, Determinism::kOff),
      tensor(GpuRank::Axis::kTensor, Determinism::kOff);
  for (const MaskCase& mask : kMaskCases) {
    SCOPED_TRACE(mask.name);
    const References& references = ReferencesOf(mask);
    const double one =
        GradientError(data.Train(GpuSpec(), references.batch, {.dtype = DType::kBF16}), references.exact);
    EXPECT_GT(one, 1e-4) << "bf16 is not what ran";
    for (const TransportKind transport : context.Transports()) {
      const GpuRank::Run run{.dtype = DType::kBF16, .transport = transport};
      EXPECT_LE(GradientError(context.Train(GpuSpec(), references.batch, run), references.exact), 1.25 * one)
          << Name(transport);
    }
    EXPECT_LE(
        GradientError(tensor.Train(GpuSpec(), references.batch, {.dtype = DType::kBF16}), references.exact),
        1.5 * one);
  }
}

TEST(ModelOnGpu, DeterministicStepsAgreeBitForBitWhateverIsRecomputed) {
  OnMasksAndRanks(Determinism::kRequired, [&](const References& references, GpuRank& rank) {
    OnRuns(rank, [&](GpuRank::Run run) {
      const Outcome first = rank.Train(GpuSpec(), references.batch, run);
      for (const Recompute recompute :
           {Recompute::kAttentionOutput, Recompute::kNone, Recompute::kElementwise, Recompute::kBlock}) {
        SCOPED_TRACE(static_cast<int>(recompute));
        run.recompute = recompute;
        ExpectSameBits(rank.Train(GpuSpec(), references.batch, run), first);
      }
    });
  });
}

}  // namespace
}  // namespace annulus::testing
