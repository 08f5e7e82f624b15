#include <algorithm>

#include "annulus/base/check.h"
#include "annulus/model/cost.h"
#include "annulus/ops/taylor_features.h"

namespace annulus {
namespace {

// On a tensor-parallel rank: elements of a segment's summary, of one sequence, and of a row before the
// convolution.
struct Handed {
  int64_t heads = 0, state = 0, transition = 1;  // elements of a head
  int64_t taps = 1, channels = 0;                // of the convolution
};

Handed HandedBy(const ModelSpec& spec, BranchKind kind, int64_t tp) {
  const auto linear = [&](const LinearSpec& of, int64_t state) {
    return Handed{.heads = of.heads / tp, .state = state};
  };
  switch (kind) {
    case BranchKind::kMamba: {
      const MambaSpec& mamba = spec.mamba;
      const int64_t heads = mamba.heads / tp, groups = std::max<int64_t>(1, mamba.groups / tp);
      return {.heads = heads,
              .state = mamba.state * mamba.head_dim,
              .taps = mamba.conv,
              .channels = heads * mamba.head_dim + 2 * groups * mamba.state};
    }
    case BranchKind::kLightning:
      return linear(spec.lightning, spec.lightning.key_dim * spec.lightning.value_dim);
    case BranchKind::kBased:
      return linear(spec.based, TaylorFeatures(spec.based.key_dim) * (spec.based.value_dim + 1));
    case BranchKind::kDeltaNet: {
      const LinearSpec& delta = spec.delta;
      Handed handed = linear(delta, delta.key_dim * delta.value_dim);
      handed.transition = delta.key_dim * delta.key_dim;
      handed.taps = std::max<int64_t>(1, delta.conv);
      handed.channels = handed.heads * (2 * delta.key_dim + delta.value_dim);
      return handed;
    }
    case BranchKind::kAttention:
    case BranchKind::kLatentAttention:
    case BranchKind::kMlp:
      break;
  }
  ANNULUS_CHECK(false) << Name(kind) << " passes no states";
  return {};
}

}  // namespace

StateExchange StateExchangeOf(const ModelSpec& spec, BranchKind kind, StateOrder order,
                              const StateExchangeInputs& inputs) {
  const Handed handed = HandedBy(spec, kind, inputs.tp);
  const int64_t summary = inputs.sequences * handed.heads * (handed.state + handed.transition);
  const int64_t row = inputs.sequences * handed.channels;
  return {.state_bytes = StateBytesSent(inputs.layout, order, summary * SizeOf(AccumOf(inputs.dtype))),
          .halo_bytes = HaloBytesSent(inputs.layout, order, handed.taps - 1, row * SizeOf(inputs.dtype))};
}

}  // namespace annulus
