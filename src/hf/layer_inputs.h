#pragma once

// What a layer sees of sequences: its normed input.

#include "annulus/model/params.h"
#include "dense.h"

namespace annulus {

class LayerInputs {
 public:
  // Of a layer of the model, found by running the layers before it: the layer's norm takes the place of the
  // final one, and the identity that of the head.
  LayerInputs(const ModelSpec& spec, const ParamStore& params, size_t layer);
  // [tokens, d_model], without meta tokens
  absl::StatusOr<Dense> Of(const std::vector<int32_t>& tokens) const;

 private:
  ModelSpec spec_;
  ParamStore params_;
  int64_t width_;
};

}  // namespace annulus
