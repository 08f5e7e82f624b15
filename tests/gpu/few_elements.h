#pragma once

// Parameters of few elements, as decays and biases of heads, beside their references. The largest error of
// eight numbers is chance, so they are judged over several batches: of each kind of parameter the root of the
// mean square of errors, which may be twice that of the naive steps.
//
//   const FewElements few(spec, shape);
//   for (const auto& one : few.batches()) outcomes.push_back(rank.Train(spec, one.batch, run));
//   for (const auto& [kind, ratio] : few.ErrorRatios(DType::kF32, outcomes)) EXPECT_LE(ratio, 2) << kind;

#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "gpu/gpu_rank.h"

namespace annulus::testing {

class FewElements {
 public:
  struct One {
    WholeBatch batch;
    Outcome exact, f32, bf16;
    const Outcome& Naive(DType dtype) const { return dtype == DType::kBF16 ? bf16 : f32; }
  };

  FewElements(const ModelSpec& spec, BatchShape shape) {
    for (int i = 0; i < kBatches; ++i) {
      shape.seed = static_cast<uint64_t>(100 + i);
      const WholeBatch batch = RandomBatch(spec, shape);
      const MeshRun run{.fill = FillForEveryDType};
      batches_.push_back({.batch = batch,
                          .exact = testing::Train(spec, batch, run),
                          .f32 = testing::Train(spec, batch, {.dtype = DType::kF32, .fill = run.fill}),
                          .bf16 = TrainRounded(spec, batch, run, GridOf(i))});
    }
  }
  const std::vector<One>& batches() const { return batches_; }
  // Another one for each batch.
  static Rounding GridOf(int batch) { return {.grid = std::exp2(static_cast<double>(batch) / kBatches)}; }

  // Of outcomes for all batches, by kind: the parameter's name in its layer.
  std::map<std::string, double> ErrorRatios(DType dtype, const std::vector<Outcome>& got) const {
    std::map<std::string, double> errors, naive_errors;
    for (size_t i = 0; i < batches_.size(); ++i) {
      for (const auto& [name, exact] : batches_[i].exact.gradients) {
        if (!IsFew(exact)) continue;
        const std::string kind = KindOf(name);
        errors[kind] += std::pow(Distance(got[i].gradients.at(name), exact), 2);
        naive_errors[kind] += std::pow(Distance(batches_[i].Naive(dtype).gradients.at(name), exact), 2);
      }
    }
    for (auto& [kind, error] : errors) error = std::sqrt(error / naive_errors.at(kind));
    return errors;
  }

 private:
  static constexpr int kBatches = 6;
  static std::string KindOf(const std::string& name) {
    const std::pair<absl::string_view, absl::string_view> parts =
        absl::StrSplit(absl::StripPrefix(name, "layers."), absl::MaxSplits('.', 1));
    return std::string(parts.second);
  }
  std::vector<One> batches_;
};

}  // namespace annulus::testing
