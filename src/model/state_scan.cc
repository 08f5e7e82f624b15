#include "state_scan.h"

namespace annulus {
namespace {

struct Sizes {
  int64_t segments, sequences, state, dim;
  DType dtype;
};
Sizes SizesOf(const Ssd& ssd) {
  return {.segments = static_cast<int64_t>(ssd.segments.size()),
          .sequences = ssd.x.batch * ssd.x.heads,
          .state = ssd.b.dim,
          .dim = ssd.x.dim,
          .dtype = AccumOf(ssd.x.dtype)};
}

SegmentSummary AllocateSummary(Arena& arena, const Ssd& ssd) {
  const Sizes n = SizesOf(ssd);
  return {.transition = arena.Allocate(n.dtype, {n.segments, n.sequences}),
          .state = arena.Allocate(n.dtype, {n.segments, n.sequences, n.state, n.dim})};
}

// Alone on its sequence a segment starts from nothing, and nothing comes back.
bool Alone(ModelStep& step) { return step.geometry.cp().size() == 1; }

}  // namespace

SegmentStates AllocateSegmentStates(Arena& arena, const Ssd& ssd) {
  const Sizes n = SizesOf(ssd);
  return arena.Allocate(n.dtype, {n.segments, n.sequences, n.state, n.dim});
}

SsdStates AllocateStates(Arena& arena, const Ssd& ssd) {
  const Sizes n = SizesOf(ssd);
  const int64_t chunks = SsdChunks(ssd);
  return {.states = arena.Allocate(n.dtype, {chunks, n.sequences, n.state, n.dim}),
          .decays = arena.Allocate(n.dtype, {chunks, n.sequences})};
}

absl::Status ScanForward(Context& ctx, ModelStep& step, const Ssd& ssd, SegmentStates initial,
                         const SsdStates& states, const Meanwhile& meanwhile, HeadsRef y) {
  ArenaScope scope(ctx.scratch);
  const SegmentSummary summary = AllocateSummary(ctx.scratch, ssd);
  ANNULUS_RETURN_IF_ERROR(SsdChunkStates(ctx, ssd, states, summary));
  ANNULUS_ASSIGN_OR_RETURN(StatePassing passing,
                           StatePassing::Start(ctx, step.geometry, StateOrder::kForward, summary));
  const absl::Status other = meanwhile ? meanwhile() : absl::OkStatus();
  ANNULUS_RETURN_IF_ERROR(passing.Finish(ctx, initial));
  step.AddStateBytes(passing.bytes_sent());
  ANNULUS_RETURN_IF_ERROR(other);
  return SsdForward(ctx, ssd, Alone(step) ? ConstTensorRef() : ConstTensorRef(initial), states, y);
}

absl::Status ScanAgain(Context& ctx, const Ssd& ssd, SegmentStates initial, const SsdStates& states,
                       HeadsRef y) {
  ArenaScope scope(ctx.scratch);
  ANNULUS_RETURN_IF_ERROR(SsdChunkStates(ctx, ssd, states, AllocateSummary(ctx.scratch, ssd)));
  return SsdForward(ctx, ssd, initial, states, y);
}

absl::Status ScanBackward(Context& ctx, ModelStep& step, const Ssd& ssd, ConstHeadsRef dy,
                          const SsdStates& states, const Meanwhile& meanwhile, const SsdGradients& out) {
  ArenaScope scope(ctx.scratch);
  const SegmentSummary summary = AllocateSummary(ctx.scratch, ssd);
  const TensorRef gradients = ctx.scratch.Allocate(states.states.dtype(), states.states.shape());
  ANNULUS_RETURN_IF_ERROR(SsdBackwardChunkStates(ctx, ssd, dy, states, gradients, summary));
  ANNULUS_ASSIGN_OR_RETURN(StatePassing passing,
                           StatePassing::Start(ctx, step.geometry, StateOrder::kBackward, summary));
  const absl::Status other = meanwhile ? meanwhile() : absl::OkStatus();
  const TensorRef final_gradient = ctx.scratch.Allocate(summary.state.dtype(), summary.state.shape());
  ANNULUS_RETURN_IF_ERROR(passing.Finish(ctx, final_gradient));
  step.AddStateBytes(passing.bytes_sent());
  ANNULUS_RETURN_IF_ERROR(other);
  return SsdBackward(ctx, ssd, dy, states, gradients,
                     Alone(step) ? ConstTensorRef() : ConstTensorRef(final_gradient), out);
}

}  // namespace annulus
