#pragma once

// What each layer sees of sequences: its normed input. Residual streams go through the model once, a layer at
// a time, so that of all layers' inputs only one layer's exist.

#include <memory>
#include <vector>

#include "annulus/model/decoder.h"
#include "annulus/train/tpla.h"
#include "dense.h"

namespace annulus {

class LayerInputs {
 public:
  // `params`: on the CPU, whole; outlive this.
  LayerInputs(const ModelSpec& spec, const ParamStore& params);

  absl::Status Add(const CalibrationSequence& sequence);
  // Takes all sequences through the layers before `layer`, which is not before that of the last call.
  absl::Status AdvanceTo(size_t layer);

  size_t size() const { return streams_.size(); }
  // Of a sequence, [tokens, d_model], meta tokens first.
  absl::StatusOr<Dense> Of(size_t sequence);
  // Which keys its queries see.
  const SequenceBatch& Masks(size_t sequence) const { return streams_[sequence]->geometry.sequences(); }

 private:
  struct Stream {
    AttentionGeometry geometry;
    ModelStep step;
    Tensor x;  // residual stream
    Stream(SequenceBatch sequence, DType dtype, int64_t d_model);
  };

  const ModelSpec& spec_;
  const ParamStore& params_;
  Context ctx_;
  Decoder decoder_;
  size_t layer_ = 0;
  std::vector<std::unique_ptr<Stream>> streams_;
};

}  // namespace annulus
