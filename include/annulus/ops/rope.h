#pragma once

// Rotary position embedding (Su et al., 2021) in the half-split convention: of the elements of a head that
// turn, i is paired with i + pairs; the pair turns by position * frequency[i].

#include <variant>
#include <vector>

#include "annulus/base/status.h"
#include "annulus/device/context.h"
#include "annulus/ops/heads.h"

namespace annulus {

// Frequencies for sequences longer than the `original_length` that a model was first trained on.
//
// Llama 3: waves longer than original_length / low_freq_factor turn `factor` times slower, those shorter than
// original_length / high_freq_factor as before, and those between as both in part.
struct Llama3Rope {
  double factor = 1, original_length = 0, low_freq_factor = 1, high_freq_factor = 4;
};
// YaRN (Peng et al., 2023) with the scale of DeepSeek-V2: pairs that turn more than beta_fast times in
// original_length turn as before, those that turn less than beta_slow times `factor` times slower.
struct YarnRope {
  double factor = 1, original_length = 0, beta_fast = 32, beta_slow = 1;
  double mscale = 1, mscale_all_dim = 0;
};
using RopeScalingLaw = std::variant<std::monostate, Llama3Rope, YarnRope>;

struct RopeFrequencies {
  std::vector<double> radians;  // per position, of each pair
  double scale = 1;             // of the elements that turn

  int64_t pairs() const { return static_cast<int64_t>(radians.size()); }
};

// theta^(-2i / dim) of the dim / 2 pairs, as the law changes them. theta > 0.
RopeFrequencies MakeRopeFrequencies(double theta, int64_t dim, const RopeScalingLaw& law = {});

// 0.1 mscale ln(factor) + 1, and 1 for factors up to 1: what YaRN multiplies queries and keys by.
double YarnScale(double factor, double mscale);

enum class RopeDirection { kForward, kGradient };  // the gradient turns back, and scales as forward does

// Rotates x in place but for the `first` leading elements of each head. positions: global position of each
// row of x; every item of a row's batch has the same.
//   x: [rows, batch, heads, first + 2 pairs]   positions: i64 [rows]
absl::Status Rope(Context& ctx, ConstTensorRef positions, const RopeFrequencies& frequencies,
                  RopeDirection direction, HeadsRef x, int64_t first = 0);

}  // namespace annulus
