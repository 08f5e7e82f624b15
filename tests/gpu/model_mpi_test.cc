// ranks: 1 2 4
//
// One step of a whole decoder on GPUs against the same step in f64 on a CPU, on meshes of all ranks. Ranks
// have a GPU each, or share.

#include "annulus/comm/gpu_communicator.h"
#include "annulus/device/gpu.h"
#include "gpu/gpu_harness.h"
#include "gpu/model_rounded.h"
#include "support/mpi_main.h"

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

// Values that bf16 holds, so that every dtype computes with the same weights.
void FillForEveryDType(ParamStore& params) {
  FillRandom(params);
  for (int bucket = 0; bucket < params.buckets(); ++bucket) {
    VisitFloat(params.dtype(), [&]<class T>() {
      const TensorRef values = params.BucketValues(bucket);
      for (int64_t i = 0; i < values.elements(); ++i) {
        T& x = values.data<T>()[i];
        x = static_cast<T>(ToFloat(ToBFloat16(static_cast<float>(x))));
      }
    });
  }
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

// What the steps on GPUs are judged by, from one rank on the CPU.
struct References {
  WholeBatch batch;
  Outcome exact, f32, bf16;

  explicit References(const MaskCase& mask) : batch(RandomBatch(GpuSpec(), mask.batch)) {
    const ModelSpec spec = GpuSpec();
    exact = testing::Train(spec, batch, {.fill = FillForEveryDType});
    f32 = testing::Train(spec, batch, {.dtype = DType::kF32, .fill = FillForEveryDType});
    bf16 = TrainRounded(spec, batch, {.fill = FillForEveryDType}, Rounding::kBFloat16);
  }
  const Outcome& Naive(DType dtype) const { return dtype == DType::kBF16 ? bf16 : f32; }
};

const References& ReferencesOf(const MaskCase& mask) {
  static std::map<std::string, References> all;
  return all.try_emplace(mask.name, mask).first->second;
}

Device ThisGpu() {
  ANNULUS_CHECK(GpuCount() > 0) << "this test needs a GPU: " << WhyNoGpu();
  const Device device{DeviceKind::kCuda, World().rank() % GpuCount()};
  ANNULUS_CHECK_OK(UseGpu(device.index));
  return device;
}

// This rank on its GPU, all ranks along one axis of the mesh.
class GpuRank {
 public:
  enum class Axis { kData, kContext, kTensor };
  GpuRank(Axis axis, Determinism determinism) : ctx_(ThisGpu(), determinism) {
    MeshShape shape;
    (axis == Axis::kData ? shape.dp : axis == Axis::kContext ? shape.cp : shape.tp) = World().size();
    mesh_ = ProcessMesh::Create(shape, World()).value();
    link_ = ChooseGpuLink(World(), ctx_).value();
    ANNULUS_CHECK_OK(mesh_.UseGpu(link_, ctx_));
  }

  std::string Name() const {
    return absl::StrCat("dp ", mesh_.shape.dp, ", cp ", mesh_.shape.cp, ", tp ", mesh_.shape.tp, ", ",
                        ctx_.determinism == Determinism::kRequired ? "deterministic, " : "");
  }
  // Every transport that the group can use; one rank has nothing to transport.
  std::vector<TransportKind> Transports() {
    std::vector<TransportKind> kinds = {TransportKind::kHost};
    if (mesh_.cp.size() == 1) return kinds;
    if (link_ == GpuLink::kNccl) kinds.push_back(TransportKind::kNccl);
    const TransportKind best = ChooseTransport(mesh_.cp, ctx_).value();
    if (best == TransportKind::kCopyEngine) kinds.push_back(best);
    return kinds;
  }

  struct Run {
    DType dtype = DType::kF32;
    TransportKind transport = TransportKind::kHost;
    Recompute recompute = Recompute::kAttentionOutput;
  };
  // Calls fn(model) with a new model.
  template <typename Fn>
  auto With(const WholeBatch& batch, const Run& run, Fn&& fn) {
    RankModel model(GpuSpec(), batch,
                    {.dtype = run.dtype,
                     .dp = mesh_.shape.dp,
                     .cp = mesh_.shape.cp,
                     .tp = mesh_.shape.tp,
                     .recompute = run.recompute,
                     .transport = run.transport,
                     .fill = FillForEveryDType},
                    mesh_, ctx_);
    return fn(model);
  }
  Outcome Train(const WholeBatch& batch, const Run& run) {
    return With(batch, run, [](RankModel& model) { return model.Train(); });
  }

 private:
  Context ctx_;
  ProcessMesh mesh_;
  GpuLink link_ = GpuLink::kHost;
};

constexpr GpuRank::Axis kAxes[] = {GpuRank::Axis::kData, GpuRank::Axis::kContext, GpuRank::Axis::kTensor};
constexpr DType kDTypes[] = {DType::kF32, DType::kBF16};

// Each token's loss is off by about the rounding of its logits, epsilon times the loss; the mean of a few
// hundred by a small part of it. The naive losses of both dtypes are within epsilon / 28.
void ExpectLoss(double got, const Outcome& naive, const Outcome& exact, DType dtype) {
  const double epsilon = std::ldexp(1.0, dtype == DType::kBF16 ? -8 : -23);
  EXPECT_LE(std::abs(got - exact.loss), 2 * std::abs(naive.loss - exact.loss) + epsilon / 8 * exact.loss);
}

void ExpectStep(const Outcome& got, const References& references, DType dtype) {
  const Outcome &naive = references.Naive(dtype), &exact = references.exact;
  ExpectLoss(got.loss, naive, exact, dtype);
  ASSERT_EQ(got.gradients.size(), exact.gradients.size());
  for (const auto& [name, gradient] : got.gradients) {
    SCOPED_TRACE(name);
    ExpectWithinRule(gradient, naive.gradients.at(name), exact.gradients.at(name), 0);
  }
}

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
    ExpectSame(TrainRounded(GpuSpec(), references.batch, {.fill = FillForEveryDType}, Rounding::kNone),
               references.exact, 1e-12);
    const double error = GradientError(references.bf16, references.exact);
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
      const std::vector<double>& exact = references.exact.gradients.at(name);
      refused +=
          MaxDifference(gradient, exact) > 3 * MaxDifference(references.bf16.gradients.at(name), exact);
    }
    EXPECT_GT(refused, 0);
  }
}

TEST(ModelOnGpu, LossAndEveryGradientFollowTheRule) {
  for (const Determinism determinism : {Determinism::kOff, Determinism::kRequired}) {
    OnMasksAndRanks(determinism, [&](const References& references, GpuRank& rank) {
      OnRuns(rank, [&](const GpuRank::Run& run) {
        rank.With(references.batch, run, [&](RankModel& model) {
          ExpectStep(model.Train(), references, run.dtype);
          ExpectLoss(model.Loss(), references.Naive(run.dtype), references.exact, run.dtype);
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
    const double one = GradientError(data.Train(references.batch, {.dtype = DType::kBF16}), references.exact);
    EXPECT_GT(one, 1e-4) << "bf16 is not what ran";
    for (const TransportKind transport : context.Transports()) {
      const GpuRank::Run run{.dtype = DType::kBF16, .transport = transport};
      EXPECT_LE(GradientError(context.Train(references.batch, run), references.exact), 1.25 * one)
          << Name(transport);
    }
    EXPECT_LE(GradientError(tensor.Train(references.batch, {.dtype = DType::kBF16}), references.exact),
              1.5 * one);
  }
}

TEST(ModelOnGpu, DeterministicStepsAgreeBitForBitWhateverIsRecomputed) {
  OnMasksAndRanks(Determinism::kRequired, [&](const References& references, GpuRank& rank) {
    OnRuns(rank, [&](GpuRank::Run run) {
      const Outcome first = rank.Train(references.batch, run);
      for (const Recompute recompute :
           {Recompute::kAttentionOutput, Recompute::kNone, Recompute::kElementwise, Recompute::kBlock}) {
        SCOPED_TRACE(static_cast<int>(recompute));
        run.recompute = recompute;
        const Outcome again = rank.Train(references.batch, run);
        EXPECT_EQ(again.loss, first.loss);
        for (const auto& [name, gradient] : first.gradients) {
          EXPECT_TRUE(SameBits(again.gradients.at(name), gradient)) << name;
        }
      }
    });
  });
}

}  // namespace
}  // namespace annulus::testing
