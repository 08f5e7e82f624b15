#pragma once

// Trained latent attention (MLA) as tensor-parallel latent attention with g branches (TPLA, 2025), which
// approximates it without further training.
//
// MLA keeps k and v in a latent c of r columns: k, v = kv_up (gain * RMS(c)). The gain is folded into kv_up,
// and an orthogonal U turns the latent, c' = U^T c, kv_up' = kv_up U: nothing has changed so far, for RMS
// does not see U. Then the columns are dealt to the branches. A branch norms its part alone and has a softmax
// of its own:
//
//   RMS_b(c'_b)       for c'_b / rms(c'): columns of kv_up_b are scaled by the typical rms(c'_b) / rms(c')
//   q . k_b           for q . sum of k_b: rows of keys are scaled, so that it is right on average
//   mean of o_b       for their sum:      rows of values are scaled by g
//
// Hadamard: U is a Hadamard matrix with random signs, so that each part has 1 / g of every direction. PCA: U
// holds the principal directions of normed latents, the largest first: the first part has nearly all of them,
// so that its scores are nearly the whole ones, and what the other parts add to the output is small.

#include <memory>
#include <vector>

#include "annulus/model/params.h"

namespace annulus {

enum class LatentTransform {
  kNone,      // parts of the latent as they stand, nothing scaled but what the mean needs
  kHadamard,  // the latent's columns are a power of two
  kPca,
};

struct TplaOptions {
  int64_t groups = 2;
  LatentTransform transform = LatentTransform::kPca;
  uint64_t seed = 0;  // of signs
};

// The same model with `groups` branches in every layer of latent attention, which have one now.
absl::StatusOr<ModelSpec> TplaSpec(const ModelSpec& spec, const TplaOptions& options);

// A sequence to calibrate with, meta tokens left out.
struct CalibrationSequence {
  std::vector<int32_t> tokens;
  // Position at which each token's document starts, which attention keeps inside of; empty: it does not.
  std::vector<int64_t> document_starts = {};
};

// Its parameters.   params: on the CPU, whole
absl::StatusOr<std::unique_ptr<ParamStore>> ConvertToTpla(const ModelSpec& spec, const ParamStore& params,
                                                          const TplaOptions& options,
                                                          const std::vector<CalibrationSequence>& sequences);

}  // namespace annulus
