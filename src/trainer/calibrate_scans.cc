// Rates of the scans of state-space layers: all kernels of a pass, as a rank runs them that has the whole
// sequence.

#include <numeric>

#include "annulus/device/transfer.h"
#include "annulus/ops/delta_rule.h"
#include "annulus/ops/elementwise.h"
#include "annulus/ops/ssd.h"
#include "calibrate_kernels.h"

namespace annulus {
namespace {

// On GPUs of the size that models have, on CPUs of those that tests train.
struct ScanCase {
  DType dtype;
  int64_t heads, groups, state, dim;  // SSD
  int64_t delta_heads, key, value;
  std::vector<int64_t> rows;
};
ScanCase CaseFor(DeviceKind device) {
  if (device == DeviceKind::kCpu) return {DType::kF32, 8, 2, 16, 16, 4, 16, 16, {64, 256, 1024}};
  return {DType::kBF16, 80, 8, 128, 64, 16, 128, 128, {512, 2048, 8192, 32768}};
}

// Memory of the context's scratch arena.
struct Sequence {
  TensorRef a, ages;
  std::vector<RowRange> segments;
};
absl::StatusOr<Sequence> SequenceOf(Context& ctx, DType dtype, int64_t rows, int64_t heads) {
  std::vector<int32_t> ages(static_cast<size_t>(rows));
  std::iota(ages.begin(), ages.end(), 0);
  Sequence sequence{.a = ctx.scratch.Allocate(AccumOf(dtype), {rows, 1, heads}),
                    .ages = Upload<int32_t>(ctx, ctx.scratch, ages).Reshaped({rows, 1}),
                    .segments = {{0, rows}}};
  ANNULUS_RETURN_IF_ERROR(Zero(ctx, sequence.a));  // nothing decays
  return sequence;
}

using Rates = std::pair<RatePoint, RatePoint>;  // forward, backward

absl::StatusOr<Rates> MeasureSsd(Context& ctx, Communicator& world, const ScanCase& c, int64_t rows) {
  ArenaScope scope(ctx.scratch);
  Arena& arena = ctx.scratch;
  const DType accum = AccumOf(c.dtype);
  const int64_t bc = c.groups * c.state, inner = c.heads * c.dim;
  const absl::StatusOr<Sequence> sequence = SequenceOf(ctx, c.dtype, rows, c.heads);
  const auto xbc = RandomTensor(ctx, arena, c.dtype, {rows, 1, 2 * bc + inner}, 1);
  const auto dy = RandomTensor(ctx, arena, c.dtype, {rows, 1, inner}, 2);
  for (const absl::Status& status : {sequence.status(), xbc.status(), dy.status()})
    ANNULUS_RETURN_IF_ERROR(world.AgreeOk(status));
  const Ssd ssd{.x = HeadsOf(*xbc, 2 * bc, c.heads, c.dim),
                .b = HeadsOf(*xbc, 0, c.groups, c.state),
                .c = HeadsOf(*xbc, bc, c.groups, c.state),
                .dt = {},
                .a = sequence->a,
                .skip = {},
                .ages = sequence->ages,
                .segments = sequence->segments};
  const auto states_of = [&](int64_t count) {
    return arena.Allocate(accum, {count, c.heads, c.state, c.dim});
  };
  const SsdStates states{.states = states_of(SsdChunks(ssd)),
                         .decays = arena.Allocate(accum, {SsdChunks(ssd), c.heads})};
  const SegmentSummary summary{.transition = arena.Allocate(accum, {1, c.heads}), .state = states_of(1)};
  const TensorRef gradients = states_of(SsdChunks(ssd)), y = arena.Allocate(c.dtype, dy->shape());
  const TensorRef dxbc = arena.Allocate(c.dtype, xbc->shape()), da = arena.Allocate(accum, ssd.a.shape());
  const SsdGradients out{.dx = HeadsOf(dxbc, 2 * bc, c.heads, c.dim),
                         .db = HeadsOf(dxbc, 0, c.groups, c.state),
                         .dc = HeadsOf(dxbc, bc, c.groups, c.state),
                         .ddt = {},
                         .da = da,
                         .dskip = {}};
  const double updates = static_cast<double>(rows * c.heads * c.state * c.dim);
  const ConstHeadsRef dy_heads = HeadsOf(*dy, 0, c.heads, c.dim);
  Rates rates;
  ANNULUS_ASSIGN_OR_RETURN(rates.first, MeasureRate(ctx, world, updates, [&]() -> absl::Status {
                             ANNULUS_RETURN_IF_ERROR(SsdChunkStates(ctx, ssd, states, summary));
                             return SsdForward(ctx, ssd, {}, states, HeadsOf(y, 0, c.heads, c.dim));
                           }));
  ANNULUS_ASSIGN_OR_RETURN(
      rates.second, MeasureRate(ctx, world, updates, [&]() -> absl::Status {
        ANNULUS_RETURN_IF_ERROR(SsdBackwardChunkStates(ctx, ssd, dy_heads, states, gradients, summary));
        return SsdBackward(ctx, ssd, dy_heads, states, gradients, {}, out);
      }));
  return rates;
}

absl::StatusOr<Rates> MeasureDelta(Context& ctx, Communicator& world, const ScanCase& c, int64_t rows) {
  ArenaScope scope(ctx.scratch);
  Arena& arena = ctx.scratch;
  const DType accum = AccumOf(c.dtype);
  const int64_t heads = c.delta_heads, keys = heads * c.key, values = heads * c.value;
  const absl::StatusOr<Sequence> sequence = SequenceOf(ctx, c.dtype, rows, heads);
  const auto raw = RandomTensor(ctx, arena, c.dtype, {rows, 1, 2 * keys}, 1);
  const auto v = RandomTensor(ctx, arena, c.dtype, {rows, 1, values}, 2);
  const auto d_o = RandomTensor(ctx, arena, c.dtype, {rows, 1, values}, 3);
  for (const absl::Status& status : {sequence.status(), raw.status(), v.status(), d_o.status()})
    ANNULUS_RETURN_IF_ERROR(world.AgreeOk(status));
  const TensorRef qk = arena.Allocate(c.dtype, raw->shape());
  ANNULUS_RETURN_IF_ERROR(
      L2NormForward(ctx, HeadsOf(*raw, 0, 2 * heads, c.key), 1e-6, HeadsOf(qk, 0, 2 * heads, c.key)));
  const DeltaRule rule{.q = HeadsOf(qk, 0, heads, c.key),
                       .k = HeadsOf(qk, keys, heads, c.key),
                       .v = HeadsOf(*v, 0, heads, c.value),
                       .beta = sequence->a,
                       .a = sequence->a,
                       .ages = sequence->ages,
                       .segments = sequence->segments};
  const auto states_of = [&](int64_t count) { return arena.Allocate(accum, {count, heads, c.key, c.value}); };
  const TensorRef initial = states_of(1), states = states_of(DeltaChunks(rule));
  ANNULUS_RETURN_IF_ERROR(Zero(ctx, initial));
  const TensorRef o = arena.Allocate(c.dtype, v->shape()), dv = arena.Allocate(c.dtype, v->shape());
  const TensorRef dqk = arena.Allocate(c.dtype, qk.shape());
  const DeltaGradients out{.dq = HeadsOf(dqk, 0, heads, c.key),
                           .dk = HeadsOf(dqk, keys, heads, c.key),
                           .dv = HeadsOf(dv, 0, heads, c.value),
                           .dbeta = arena.Allocate(accum, sequence->a.shape()),
                           .da = arena.Allocate(accum, sequence->a.shape())};
  const double updates = static_cast<double>(rows * heads * c.key * c.value);
  Rates rates;
  ANNULUS_ASSIGN_OR_RETURN(rates.first, MeasureRate(ctx, world, updates, [&] {
                             return DeltaForward(ctx, rule, initial, states, HeadsOf(o, 0, heads, c.value));
                           }));
  ANNULUS_ASSIGN_OR_RETURN(rates.second, MeasureRate(ctx, world, updates, [&] {
                             return DeltaBackward(ctx, rule, HeadsOf(*d_o, 0, heads, c.value), states,
                                                  initial, out);
                           }));
  return rates;
}

}  // namespace

absl::StatusOr<std::vector<ScanRate>> MeasureScans(Context& ctx, Communicator world,
                                                   CalibrationClock& clock) {
  const ScanCase c = CaseFor(ctx.device.kind);
  std::vector<ScanRate> all;
  for (const ScanKernel kernel : {ScanKernel::kSsd, ScanKernel::kDeltaRule}) {
    ScanRate forward{.kernel = kernel, .pass = Pass::kForward, .updates = {}};
    ScanRate backward{.kernel = kernel, .pass = Pass::kBackward, .updates = {}};
    for (const int64_t rows : c.rows) {
      if (!forward.updates.empty()) {
        ANNULUS_ASSIGN_OR_RETURN(const bool over, clock.Over());
        if (over) break;
      }
      ANNULUS_ASSIGN_OR_RETURN(const Rates rates, kernel == ScanKernel::kSsd
                                                      ? MeasureSsd(ctx, world, c, rows)
                                                      : MeasureDelta(ctx, world, c, rows));
      forward.updates.push_back(rates.first);
      backward.updates.push_back(rates.second);
    }
    all.push_back(forward);
    all.push_back(backward);
  }
  return all;
}

}  // namespace annulus
