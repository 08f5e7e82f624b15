#include "model_rope.h"

namespace annulus {
namespace {

RopeScalingLaw LawOf(const RopeScaling& scaling) {
  switch (scaling.kind) {
    case RopeScalingKind::kNone:
      break;
    case RopeScalingKind::kLlama3:
      return Llama3Rope{.factor = scaling.factor,
                        .original_length = scaling.original_length,
                        .low_freq_factor = scaling.low_freq_factor,
                        .high_freq_factor = scaling.high_freq_factor};
    case RopeScalingKind::kYarn:
      return YarnRope{.factor = scaling.factor,
                      .original_length = scaling.original_length,
                      .beta_fast = scaling.beta_fast,
                      .beta_slow = scaling.beta_slow,
                      .mscale = scaling.mscale,
                      .mscale_all_dim = scaling.mscale_all_dim};
  }
  return {};
}

}  // namespace

std::optional<RopeFrequencies> RopeOf(const ModelSpec& spec, const BranchSpec& branch, int64_t dim) {
  if (!branch.rope_theta.has_value()) return std::nullopt;
  return MakeRopeFrequencies(*branch.rope_theta, dim, LawOf(spec.rope_scaling));
}

}  // namespace annulus
