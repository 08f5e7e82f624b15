#include "layer_inputs.h"

#include <cstring>

#include "annulus/device/transfer.h"
#include "annulus/model/decoder.h"

namespace annulus {
namespace {

ModelSpec SpecBefore(ModelSpec spec, size_t layer) {
  spec.layers.resize(layer);
  spec.vocab_size = std::max(spec.vocab_size, spec.d_model);  // rows of the head
  spec.tied_head = false;
  return spec;
}

void CopyFront(ConstTensorRef from, TensorRef to) {
  std::memcpy(to.raw(), from.raw(), static_cast<size_t>(std::min(from.bytes(), to.bytes())));
}

}  // namespace

LayerInputs::LayerInputs(const ModelSpec& spec, const ParamStore& params, size_t layer)
    : spec_(SpecBefore(spec, layer)),
      params_(Device{}, params.dtype(), BuildParamTable(spec_), 1),
      width_(spec.d_model) {
  ANNULUS_CHECK(spec.meta_tokens == 0);
  const ParamTable& from = params.table();
  for (size_t i = 0; i < params_.table().params.size(); ++i) {
    const std::string& name = params_.table().params[i].name;
    const TensorRef to = params_.Value(static_cast<int>(i));
    if (name == "head.weight") {
      VisitFloat(to.dtype(), [&]<class T>() {
        for (int64_t r = 0; r < width_; ++r) to.data<T>()[r * width_ + r] = 1;
      });
    } else if (name == "final_norm.weight") {
      CopyFront(params.Value(from.IndexOf(absl::StrCat("layers.", layer, ".norm.weight"))), to);
    } else {
      CopyFront(params.Value(from.IndexOf(name)), to);  // of the embedding, rows that are more stay zero
    }
  }
}

absl::StatusOr<Dense> LayerInputs::Of(const std::vector<int32_t>& tokens) const {
  const auto length = static_cast<int64_t>(tokens.size());
  Context ctx{Device{}};
  Decoder decoder(spec_, Recompute::kBlock, params_);
  AttentionGeometry geometry(SequenceLayout(LayoutKind::kContiguous, length, 1), MakeLoopbackGroup(1)[0]);
  geometry.SetBatch({.batch = 1, .lengths = {length}, .document_starts = {}});
  ModelStep step{.geometry = geometry};
  const Tensor logits(Device{}, params_.dtype(), {length, spec_.vocab_size});
  const TensorRef local = Upload<int32_t>(ctx, ctx.scratch, LocalTokens(spec_, params_.table(), tokens));
  ANNULUS_RETURN_IF_ERROR(decoder.Logits(ctx, step, local, 0, logits.ref()));
  Dense inputs = Dense::Zeros(length, width_);
  VisitFloat(params_.dtype(), [&]<class T>() {
    for (int64_t r = 0; r < length; ++r) {
      std::copy_n(logits.ref().data<T>() + r * spec_.vocab_size, width_, inputs.row(r));
    }
  });
  return inputs;
}

}  // namespace annulus
