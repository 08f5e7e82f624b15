#pragma once

// A decoder on this rank's GPU beside its references on one CPU rank. Ranks have a GPU each, or share.
//
//   const References references(spec, batch);
//   GpuRank rank(GpuRank::Axis::kContext, Determinism::kOff);
//   ExpectStep(rank.Train(spec, references.batch, {.dtype = DType::kBF16}), references, DType::kBF16);

#include "annulus/comm/gpu_communicator.h"
#include "annulus/device/gpu.h"
#include "gpu/gpu_harness.h"
#include "gpu/model_rounded.h"
#include "support/mpi_main.h"

namespace annulus::testing {

// Values that bf16 holds, so that every dtype computes with the same weights.
inline void FillForEveryDType(ParamStore& params) {
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

// What steps on GPUs are judged by, from CPUs. Errors of rounding are chance: of one naive outcome's largest
// errors a few in a hundred are twice those of another's. So there are several: in f32 other orders of the
// same sums, in bf16 other grids of rounding.
struct References {
  WholeBatch batch;
  Outcome exact;
  std::vector<Outcome> f32, bf16;

  References(const ModelSpec& spec, const BatchShape& shape) : batch(RandomBatch(spec, shape)) {
    exact = testing::Train(spec, batch, {.fill = FillForEveryDType});
    for (const auto& [cp, tp] : {std::pair{1, 1}, {2, 1}, {3, 1}, {1, 2}}) {
      f32.push_back(
          testing::Train(spec, batch, {.dtype = DType::kF32, .cp = cp, .tp = tp, .fill = FillForEveryDType}));
    }
    constexpr int kGrids = 6;  // an octave of them
    for (int i = 0; i < kGrids; ++i) {
      const Rounding rounding = {std::exp2(static_cast<double>(i) / kGrids)};
      bf16.push_back(TrainRounded(spec, batch, {.fill = FillForEveryDType}, rounding));
    }
  }
  const std::vector<Outcome>& Naive(DType dtype) const { return dtype == DType::kBF16 ? bf16 : f32; }
  double NaiveLossError(DType dtype) const {
    double worst = 0;
    for (const Outcome& naive : Naive(dtype)) worst = std::max(worst, std::abs(naive.loss - exact.loss));
    return worst;
  }
  // The naive gradient that is furthest off.
  const std::vector<double>& WorstNaive(DType dtype, const std::string& parameter) const {
    const std::vector<double>& want = exact.gradients.at(parameter);
    const auto error = [&](const Outcome& naive) {
      return MaxDifference(naive.gradients.at(parameter), want);
    };
    const std::vector<Outcome>& all = Naive(dtype);
    return std::max_element(all.begin(), all.end(),
                            [&](const Outcome& a, const Outcome& b) { return error(a) < error(b); })
        ->gradients.at(parameter);
  }
  // ExpectWithinRule without its atol, as a question.
  bool WithinRule(DType dtype, const std::string& parameter, const std::vector<double>& gradient) const {
    const std::vector<double>& want = exact.gradients.at(parameter);
    return MaxDifference(gradient, want) <= 2 * MaxDifference(WorstNaive(dtype, parameter), want);
  }
};

// Each token's loss is off by about the rounding of its logits, epsilon times the loss; the mean of a few
// hundred by a small part of it. The naive losses of both dtypes are within epsilon / 28.
inline void ExpectLoss(double got, const References& references, DType dtype) {
  const double epsilon = std::ldexp(1.0, dtype == DType::kBF16 ? -8 : -23), exact = references.exact.loss;
  EXPECT_LE(std::abs(got - exact), 2 * references.NaiveLossError(dtype) + epsilon / 8 * exact);
}

inline double Distance(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum);
}

// What has few elements, as biases of heads have, has few chances to show how far off it may be.
inline bool IsFew(const std::vector<double>& gradient) { return gradient.size() < 64; }

// Of each parameter the worst naive error, twice. Errors of those of few elements are judged together, by the
// root of their mean square, each in units of its naive ones; few_elements.h judges them kind by kind.
inline void ExpectStep(const Outcome& got, const References& references, DType dtype) {
  ExpectLoss(got.loss, references, dtype);
  ASSERT_EQ(got.gradients.size(), references.exact.gradients.size());
  double squares = 0, few = 0;
  for (const auto& [name, gradient] : got.gradients) {
    SCOPED_TRACE(name);
    const std::vector<double>& exact = references.exact.gradients.at(name);
    if (!IsFew(gradient)) {
      ExpectWithinRule(gradient, references.WorstNaive(dtype, name), exact, 0);
      continue;
    }
    double naive = 0;
    for (const Outcome& outcome : references.Naive(dtype)) {
      naive += std::pow(Distance(outcome.gradients.at(name), exact), 2);
    }
    squares +=
        std::pow(Distance(gradient, exact), 2) / naive * static_cast<double>(references.Naive(dtype).size());
    ++few;
  }
  if (few > 0) {
    EXPECT_LE(std::sqrt(squares / few), 2) << "parameters of few elements";
  }
}

inline void ExpectSameBits(const Outcome& got, const Outcome& expected) {
  EXPECT_EQ(got.loss, expected.loss);
  for (const auto& [name, gradient] : expected.gradients) {
    EXPECT_TRUE(SameBits(got.gradients.at(name), gradient)) << name;
  }
}

inline Device ThisGpu() {
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
  // Every transport that the group can use, the best last; one rank has nothing to transport.
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
  auto With(const ModelSpec& spec, const WholeBatch& batch, const Run& run, Fn&& fn) {
    RankModel model(spec, batch,
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
  Outcome Train(const ModelSpec& spec, const WholeBatch& batch, const Run& run) {
    return With(spec, batch, run, [](RankModel& model) { return model.Train(); });
  }

 private:
  Context ctx_;
  ProcessMesh mesh_;
  GpuLink link_ = GpuLink::kHost;
};

}  // namespace annulus::testing
