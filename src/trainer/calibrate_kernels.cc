#include "calibrate_kernels.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "annulus/device/transfer.h"
#include "annulus/ops/elementwise.h"
#include "annulus/parallel/call_work.h"
#include "annulus/train/measure.h"

namespace annulus {
namespace {

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Rows of the blocks, the most telling first: when time runs out the others are left away.
std::vector<int64_t> BlockRowsOf(DeviceKind device) {
  if (device == DeviceKind::kCpu) return {256, 64, 1024, 128, 512, 32};
  return {4096, 1024, 256, 16384, 2048, 8192};
}

constexpr double kLongestCall = 0.3;  // seconds; a larger block is not tried

// One line of the profile that is being made.
struct Series {
  AttentionRate rate;
  Determinism determinism = Determinism::kOff;  // with which the kernel is chosen
};

// Each kernel once, in each order of sums that it has.
std::vector<Series> SeriesFor(const Context& ctx, const CalibrationHeads& heads) {
  std::vector<Series> all;
  for (const Determinism determinism : {Determinism::kOff, Determinism::kRequired}) {
    for (const MaskShape shape : {MaskShape::kGeneral, MaskShape::kFull, MaskShape::kCausal}) {
      for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
        const AttentionKernel kernel = ChooseAttentionKernel({.device = ctx.device.kind,
                                                              .hopper = ctx.hopper,
                                                              .dtype = heads.dtype,
                                                              .dim = heads.head_dim,
                                                              .v_dim = heads.v_head_dim,
                                                              .mask_shape = shape,
                                                              .pass = pass,
                                                              .determinism = determinism});
        const Determinism order = OrdersSums(kernel, pass) ? determinism : Determinism::kOff;
        const bool known = std::any_of(all.begin(), all.end(), [&](const Series& each) {
          return each.rate.kernel == kernel && each.rate.shape == shape && each.rate.pass == pass &&
                 each.rate.determinism == order;
        });
        if (known) continue;
        all.push_back({.rate = {.kernel = kernel,
                                .pass = pass,
                                .shape = shape,
                                .head_dim = heads.head_dim,
                                .v_head_dim = heads.v_head_dim,
                                .determinism = order,
                                .pairs = {}},
                       .determinism = determinism});
      }
    }
  }
  return all;
}

absl::StatusOr<RatePoint> MeasureBlock(Context& ctx, Communicator& world, const Series& series,
                                       CalibrationBlock& block, int multiprocessors) {
  ArenaScope scope(ctx.scratch);
  const Pass pass = series.rate.pass;
  const AttentionKernel kernel = series.rate.kernel;
  block.Mask(series.rate.shape);
  const double work = block.Work(kernel, pass, multiprocessors);
  const auto run = [&] { return block.Run(pass, kernel); };
  ctx.determinism = series.determinism;
  if (pass == Pass::kBackward) ANNULUS_RETURN_IF_ERROR(world.AgreeOk(block.PrepareBackward()));
  return MeasureRate(ctx, world, work, run);
}

}  // namespace

CalibrationBlock::CalibrationBlock(Context& ctx, const CalibrationHeads& heads, int64_t rows)
    : ctx_(ctx), heads_(heads), rows_(rows) {}

absl::Status CalibrationBlock::Make() {
  Arena& arena = ctx_.scratch;
  const DType dtype = heads_.dtype, wide = AccumOf(dtype);
  const int64_t h = heads_.heads, kv = heads_.kv_heads, d = heads_.head_dim, v = heads_.v_head_dim;
  ANNULUS_ASSIGN_OR_RETURN(q_, RandomTensor(ctx_, arena, dtype, {rows_, 1, h * d}, 1));
  ANNULUS_ASSIGN_OR_RETURN(kv_, RandomTensor(ctx_, arena, dtype, {rows_, 1, kv * (d + v)}, 2));
  ANNULUS_ASSIGN_OR_RETURN(dout_, RandomTensor(ctx_, arena, dtype, {rows_, 1, h * v}, 3));
  out_ = arena.Allocate(dtype, dout_.shape());
  lse_ = arena.Allocate(wide, {rows_, 1, h});
  delta_ = arena.Allocate(wide, lse_.shape());
  dq_ = arena.Allocate(dtype, q_.shape());
  dkv_ = arena.Allocate(dtype, kv_.shape());
  sum_out_ = arena.Allocate(wide, out_.shape());
  sum_lse_ = arena.Allocate(wide, lse_.shape());
  sum_dq_ = arena.Allocate(wide, q_.shape());
  sum_dkv_ = arena.Allocate(wide, kv_.shape());
  for (const TensorRef& sum : {sum_dq_, sum_dkv_}) ANNULUS_RETURN_IF_ERROR(Zero(ctx_, sum));
  ANNULUS_RETURN_IF_ERROR(ResetPartial(ctx_, {.out = Out(sum_out_), .lse = sum_lse_}));
  return absl::OkStatus();
}

void CalibrationBlock::Mask(MaskShape shape) {
  shape_ = shape;
  lo_.clear(), hi_.clear();
  for (int64_t row = 0; row < rows_; ++row) {
    // General: a window over a quarter of the rows.
    lo_.push_back(shape == MaskShape::kGeneral ? std::max<int64_t>(0, row + 1 - rows_ / 4) : 0);
    hi_.push_back(shape == MaskShape::kFull ? rows_ : row + 1);
  }
  bounds_ = {Upload<int64_t>(ctx_, ctx_.scratch, lo_), Upload<int64_t>(ctx_, ctx_.scratch, hi_)};
}

double CalibrationBlock::Work(AttentionKernel kernel, Pass pass, int multiprocessors) const {
  const AttentionTiles tiles = TilesOf(kernel, pass, heads_.head_dim);
  std::vector<QueryTileKeys> call;
  for (int64_t row = 0; row < rows_; row += tiles.queries) {
    // Bounds ascend.
    const int64_t end = std::min(row + tiles.queries, rows_);
    call.push_back({lo_[static_cast<size_t>(row)], hi_[static_cast<size_t>(end - 1)]});
  }
  return WorkOf(tiles, multiprocessors, heads_.heads, call);
}

HeadsRef CalibrationBlock::Out(const TensorRef& x) const {
  return HeadsOf(x, 0, heads_.heads, heads_.v_head_dim);
}
HeadsRef CalibrationBlock::K(const TensorRef& x) const {
  return HeadsOf(x, 0, heads_.kv_heads, heads_.head_dim);
}
HeadsRef CalibrationBlock::V(const TensorRef& x) const {
  return HeadsOf(x, heads_.kv_heads * heads_.head_dim, heads_.kv_heads, heads_.v_head_dim);
}

AttentionBlock CalibrationBlock::Operands() const {
  return {.q = HeadsOf(q_, 0, heads_.heads, heads_.head_dim),
          .k = K(kv_),
          .v = V(kv_),
          .bounds = bounds_,
          .mask_shape = shape_,
          .key_positions = {},
          .scale = 1 / std::sqrt(static_cast<double>(heads_.head_dim))};
}

absl::Status CalibrationBlock::PrepareBackward() {
  ANNULUS_RETURN_IF_ERROR(RunWhole(Pass::kForward));
  return AttentionDelta(ctx_, Out(out_), Out(dout_), delta_);
}

absl::Status CalibrationBlock::Run(Pass pass, AttentionKernel kernel) {
  if (kernel == AttentionKernel::kCudnn) return RunWhole(pass);
  if (pass == Pass::kForward)
    return AttentionForward(ctx_, Operands(), {.out = Out(sum_out_), .lse = sum_lse_});
  return AttentionBackward(ctx_, Operands(),
                           {.out = Out(out_),
                            .dout = Out(dout_),
                            .lse = lse_,
                            .delta = delta_,
                            .dq = HeadsOf(sum_dq_, 0, heads_.heads, heads_.head_dim),
                            .dk = K(sum_dkv_),
                            .dv = V(sum_dkv_)});
}

absl::Status CalibrationBlock::RunWhole(Pass pass) {
  if (pass == Pass::kForward) return AttentionForwardWhole(ctx_, Operands(), Out(out_), lse_);
  return AttentionBackwardWhole(ctx_, Operands(),
                                {.out = Out(out_),
                                 .dout = Out(dout_),
                                 .lse = lse_,
                                 .delta = delta_,
                                 .dq = HeadsOf(dq_, 0, heads_.heads, heads_.head_dim),
                                 .dk = K(dkv_),
                                 .dv = V(dkv_),
                                 .kv_write = Write::kOverwrite});
}

CalibrationClock::CalibrationClock(Communicator world, double seconds)
    : world_(std::move(world)), end_(Now() + seconds) {}

absl::StatusOr<bool> CalibrationClock::Over() {
  ANNULUS_ASSIGN_OR_RETURN(const double over, world_.AllReduceValue(Now() > end_ ? 1 : 0, ReduceOp::kMax));
  return over > 0;
}

absl::StatusOr<RatePoint> MeasureRate(Context& ctx, Communicator& world, double size,
                                      const std::function<absl::Status()>& call) {
  ANNULUS_ASSIGN_OR_RETURN(const double once, SecondsOf(ctx, world, {.warm_ups = 1, .timed = 1}, call));
  // A step is as long as its calls on the average. What interrupts a core does so every few milliseconds, and
  // is in every repeat that is longer; what a repeat may have met besides, the median leaves out. A GPU that
  // works on is slower than one that works in bursts, by its power: so long that it is seen, with work while
  // the host launches the next call.
  const bool cpu = ctx.device.kind == DeviceKind::kCpu;
  const double enough = cpu ? 5e-3 : 2e-2;
  const Repeats repeats{
      .warm_ups = 0,
      .timed = 5,
      .seconds = cpu ? 0.2 : 10,
      .calls = std::clamp<int64_t>(static_cast<int64_t>(enough / once), 1, cpu ? 4096 : 256),
      .slowest = Slowest::kByMedian};
  ANNULUS_ASSIGN_OR_RETURN(const double seconds, SecondsOf(ctx, world, repeats, call));
  return RatePoint{.size = size, .per_second = Rounded(size / seconds)};
}

double Rounded(double value) {
  if (value == 0 || !std::isfinite(value)) return value;
  const double unit = std::pow(10.0, std::floor(std::log10(std::abs(value))) - 3);
  // Divided by a whole number where the unit is below one, so that the text is as short as the digits.
  return unit >= 1 ? std::round(value / unit) * unit : std::round(value / unit) / std::round(1 / unit);
}

absl::StatusOr<std::vector<AttentionRate>> MeasureAttention(Context& ctx, Communicator world,
                                                            const CalibrationHeads& heads,
                                                            int multiprocessors, CalibrationClock& clock) {
  std::vector<Series> all = SeriesFor(ctx, heads);
  const Determinism before = ctx.determinism;
  for (const int64_t rows : BlockRowsOf(ctx.device.kind)) {
    ANNULUS_ASSIGN_OR_RETURN(const bool over, clock.Over());
    if (over && !all.front().rate.pairs.empty()) break;
    ArenaScope scope(ctx.scratch);
    CalibrationBlock block(ctx, heads, rows);
    ANNULUS_RETURN_IF_ERROR(world.AgreeOk(block.Make()));
    for (Series& series : all) {
      std::vector<RatePoint>& points = series.rate.pairs;
      const double largest = static_cast<double>(rows * rows * heads.heads);
      if (!points.empty() && largest / points.front().per_second > kLongestCall) continue;
      ANNULUS_ASSIGN_OR_RETURN(const RatePoint point,
                               MeasureBlock(ctx, world, series, block, multiprocessors));
      points.push_back(point);
    }
  }
  ctx.determinism = before;
  std::vector<AttentionRate> rates;
  for (Series& series : all) {
    std::sort(series.rate.pairs.begin(), series.rate.pairs.end(),
              [](const RatePoint& a, const RatePoint& b) { return a.size < b.size; });
    rates.push_back(std::move(series.rate));
  }
  return rates;
}

}  // namespace annulus
