// Validation: loss, and how often the target is the model's first choice.

#include <algorithm>

#include "annulus/device/trace.h"
#include "annulus/ops/elementwise.h"
#include "annulus/train/trainer.h"

namespace annulus {
namespace {

// Whether no other logit is as large: where all are equal, nothing is known.
template <typename T>
bool IsFirstChoice(absl::Span<const T> logits, int32_t target) {
  const T own = logits[static_cast<size_t>(target)];
  return std::count_if(logits.begin(), logits.end(), [&](T logit) { return !(logit < own); }) == 1;
}

}  // namespace

// Of this cp rank's tokens. Their logits all exist at once.
absl::StatusOr<int64_t> Trainer::CountHits(const MicroBatch& micro, const TokenSlice& slice) {
  ModelStep step{.geometry = geometry_, .tensor = tensor_};
  const Shape shape = {static_cast<int64_t>(micro.targets.size()), spec_.model.vocab_size};
  const TensorRef logits = ctx_.scratch.Allocate(params_.dtype(), shape);
  ANNULUS_RETURN_IF_ERROR(decoder_.Logits(ctx_, step, slice.tokens, 0, logits));
  TensorRef wide = logits;
  if (AccumOf(logits.dtype()) != logits.dtype()) {
    wide = ctx_.scratch.Allocate(AccumOf(logits.dtype()), shape);
    ANNULUS_RETURN_IF_ERROR(Cast(ctx_, logits, wide));
  }
  const Tensor host(Device{}, wide.dtype(), shape);
  Download(ctx_, wide, host.ref().raw());
  return VisitFloat(wide.dtype(), [&]<class T>() {
    int64_t hits = 0;
    for (size_t i = 0; i < micro.targets.size(); ++i) {
      const T* row = host.ref().data<T>() + static_cast<int64_t>(i) * shape[1];
      if (micro.targets[i] == kIgnoredTarget) continue;
      hits += IsFirstChoice<T>({row, static_cast<size_t>(shape[1])}, micro.targets[i]);
    }
    return hits;
  });
}

absl::StatusOr<Evaluation> Trainer::Evaluate(const DataSet& data, const EvaluationProgress& progress) {
  const TraceRange range("evaluation");
  int64_t sequences = data.validation_sequences();
  if (spec_.eval.sequences > 0) sequences = std::min(sequences, spec_.eval.sequences);
  double counted = 0, hits = 0;
  ANNULUS_RETURN_IF_ERROR(Zero(ctx_, stats_.ref()));
  const auto run = [&]() -> absl::Status {
    ANNULUS_RETURN_IF_ERROR(optimizer_.WaitForParameters());
    std::vector<Sequence> pending;
    for (int64_t i = mesh_.at.dp; i < sequences; i += mesh_.shape.dp) {
      ANNULUS_ASSIGN_OR_RETURN(Sequence sequence, data.Validation(i));
      pending.push_back(std::move(sequence));
      if (static_cast<int64_t>(pending.size()) < spec_.optim.micro_batch && i + mesh_.shape.dp < sequences)
        continue;
      const MicroBatch micro = MakeMicroBatch(pending, spec_, layout(), mesh_.at.cp);
      pending.clear();
      geometry_.SetBatch(micro.sequences);
      ModelStep step{.geometry = geometry_, .tensor = tensor_};
      ArenaScope scope(ctx_.scratch);
      const TokenSlice slice = UploadTokens(micro);
      ANNULUS_RETURN_IF_ERROR(decoder_.Loss(ctx_, step, slice, {}, stats_.ref().Rows(1, 2)));
      // Every cp rank knows the count of the whole sequences; one of them reports it.
      if (mesh_.at.cp == 0) counted += static_cast<double>(micro.counted_tokens);
      if (spec_.eval.accuracy) {
        ANNULUS_ASSIGN_OR_RETURN(const int64_t more, CountHits(micro, slice));
        hits += static_cast<double>(more);
      }
      progress(std::min(i - mesh_.at.dp + mesh_.shape.dp, sequences), sequences);
    }
    return absl::OkStatus();
  };
  ANNULUS_RETURN_IF_ERROR(mesh_.world.AgreeOk(run()));
  stats_read_.Start(ctx_, stats_.ref());
  double sums[3] = {stats_read_.Wait()[1], counted, hits};
  ANNULUS_RETURN_IF_ERROR(mesh_.dp_cp.AllReduce(TensorRef(sums, DType::kF64, Device{}, {3}), ReduceOp::kSum));
  if (sums[1] == 0) return mesh_.world.AgreeOk(Invalid("validation split: no token is counted in the loss"));
  Evaluation evaluation{.loss = sums[0] / sums[1]};
  if (spec_.eval.accuracy) evaluation.accuracy = sums[2] / sums[1];
  return evaluation;
}

}  // namespace annulus
