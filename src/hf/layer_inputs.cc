#include "layer_inputs.h"

#include <numeric>

#include "annulus/device/transfer.h"

namespace annulus {

LayerInputs::Stream::Stream(SequenceBatch sequence, DType dtype, int64_t d_model)
    : geometry(SequenceLayout(LayoutKind::kContiguous, sequence.lengths[0], 1), MakeLoopbackGroup(1)[0]),
      step{.geometry = geometry},
      x(Device{}, dtype, {sequence.lengths[0], d_model}) {
  geometry.SetBatch(std::move(sequence));
}

LayerInputs::LayerInputs(const ModelSpec& spec, const ParamStore& params)
    : spec_(spec), params_(params), ctx_(Device{}), decoder_(spec, Recompute::kBlock, params) {}

absl::Status LayerInputs::Add(const CalibrationSequence& sequence) {
  ANNULUS_CHECK(layer_ == 0) << "sequences come before layers";
  SequenceBatch batch{
      .batch = 1, .lengths = {static_cast<int64_t>(sequence.tokens.size())}, .document_starts = {}};
  if (!sequence.document_starts.empty()) batch.document_starts = {sequence.document_starts};
  streams_.push_back(
      std::make_unique<Stream>(WithMetaTokens(spec_, std::move(batch)), params_.dtype(), spec_.d_model));
  Stream& stream = *streams_.back();
  std::vector<int32_t> tokens(static_cast<size_t>(spec_.meta_tokens));
  std::iota(tokens.begin(), tokens.end(), static_cast<int32_t>(spec_.vocab_size));
  tokens.insert(tokens.end(), sequence.tokens.begin(), sequence.tokens.end());
  ArenaScope scope(ctx_.scratch);
  const TensorRef rows = Upload<int32_t>(ctx_, ctx_.scratch, LocalTokens(spec_, params_.table(), tokens));
  return decoder_.Embed(ctx_, stream.step, rows, stream.x.ref());
}

absl::Status LayerInputs::AdvanceTo(size_t layer) {
  ANNULUS_CHECK(layer_ <= layer) << "layer " << layer << " comes before " << layer_;
  for (; layer_ < layer; ++layer_) {
    for (const std::unique_ptr<Stream>& stream : streams_) {
      ANNULUS_RETURN_IF_ERROR(decoder_.Advance(ctx_, stream->step, layer_, stream->x.ref()));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Dense> LayerInputs::Of(size_t sequence) {
  const TensorRef x = streams_[sequence]->x.ref();
  ArenaScope scope(ctx_.scratch);
  const TensorRef normed = ctx_.scratch.Allocate(x.dtype(), x.shape());
  ANNULUS_RETURN_IF_ERROR(decoder_.NormedInput(ctx_, layer_, x, normed));
  Dense inputs = Dense::Zeros(x.dim(0), x.dim(1));
  VisitFloat(x.dtype(),
             [&]<class T>() { std::copy_n(normed.data<T>(), normed.elements(), inputs.values.begin()); });
  return inputs;
}

}  // namespace annulus
