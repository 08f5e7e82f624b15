// Rates of passes over memory by what they do: a norm or an activation may be far from a copy. Bytes are
// counted as the cost of a step counts them.

#include "annulus/base/row_range.h"
#include "annulus/device/transfer.h"
#include "annulus/ops/adamw.h"
#include "annulus/ops/conv1d.h"
#include "annulus/ops/cross_entropy.h"
#include "annulus/ops/elementwise.h"
#include "annulus/ops/gated_norm.h"
#include "annulus/ops/rms_norm.h"
#include "annulus/ops/rope.h"
#include "annulus/ops/swiglu.h"
#include "calibrate_kernels.h"

namespace annulus {
namespace {

constexpr double kEps = 1e-5;
constexpr int64_t kTaps = 4, kHeadDim = 64, kGroups = 8;

// Operands of passes over [rows, columns]; memory of the context's scratch arena.
class PassBench {
 public:
  PassBench(Context& ctx, DType dtype, int64_t rows, int64_t columns)
      : ctx_(ctx), dtype_(dtype), rows_(rows), columns_(columns) {}

  absl::Status Make() {
    Arena& arena = ctx_.scratch;
    const DType accum = AccumOf(dtype_);
    const Shape shape{rows_, 1, columns_};
    ANNULUS_ASSIGN_OR_RETURN(wide_, RandomTensor(ctx_, arena, dtype_, {rows_, 2 * columns_}, 1));
    ANNULUS_ASSIGN_OR_RETURN(x_, RandomTensor(ctx_, arena, dtype_, shape, 2));
    ANNULUS_ASSIGN_OR_RETURN(dy_, RandomTensor(ctx_, arena, dtype_, shape, 3));
    ANNULUS_ASSIGN_OR_RETURN(w_, RandomTensor(ctx_, arena, dtype_, {columns_}, 4));
    ANNULUS_ASSIGN_OR_RETURN(taps_, RandomTensor(ctx_, arena, dtype_, {columns_, kTaps}, 5));
    ANNULUS_ASSIGN_OR_RETURN(halo_, RandomTensor(ctx_, arena, dtype_, {1, kTaps - 1, 1, columns_}, 6));
    dwide_ = arena.Allocate(dtype_, wide_.shape());
    y_ = arena.Allocate(dtype_, shape), dx_ = arena.Allocate(dtype_, shape);
    dgate_ = arena.Allocate(dtype_, shape), dhalo_ = arena.Allocate(dtype_, halo_.shape());
    dw_ = arena.Allocate(accum, w_.shape()), dtaps_ = arena.Allocate(accum, taps_.shape());
    dbias_ = arena.Allocate(accum, w_.shape());
    for (TensorRef* state : {&param_, &m_, &v_, &grad_}) *state = arena.Allocate(accum, {rows_ * columns_});
    for (const TensorRef& zeroed : {dx_, dw_, dtaps_, dbias_, param_, m_, v_, grad_})
      ANNULUS_RETURN_IF_ERROR(Zero(ctx_, zeroed));
    std::vector<int64_t> positions;
    for (int64_t row = 0; row < rows_; ++row) positions.push_back(row);
    positions_ = Upload<int64_t>(ctx_, arena, positions);
    ages_ = Upload<int32_t>(ctx_, arena, std::vector<int32_t>(positions.begin(), positions.end()))
                .Reshaped({rows_, 1});
    factor_ = Upload<double>(ctx_, arena, std::vector<double>{1.0});
    return absl::OkStatus();
  }

  double elements() const { return static_cast<double>(rows_ * columns_); }

  absl::Status Norm() { return RmsNormForward(ctx_, Flat(x_), w_, kEps, Flat(y_)); }
  absl::Status NormBackward() { return RmsNormBackward(ctx_, Flat(x_), w_, Flat(dy_), kEps, Flat(dx_), dw_); }
  absl::Status Activation() { return SwigluForward(ctx_, wide_, Flat(y_)); }
  absl::Status ActivationBackward() { return SwigluBackward(ctx_, wide_, Flat(dy_), dwide_); }
  absl::Status Turn() {
    return Rope(ctx_, positions_, rope_, RopeDirection::kForward,
                HeadsOf(y_, 0, columns_ / kHeadDim, kHeadDim));
  }
  absl::Status Convolution() { return Conv1dForward(ctx_, Conv(), Heads(x_), Heads(y_)); }
  absl::Status ConvolutionBackward() {
    return Conv1dBackward(ctx_, Conv(), Heads(x_), Heads(dy_),
                          {.dx = Heads(dx_), .dhalo = dhalo_, .dw = dtaps_, .dbias = dbias_});
  }
  absl::Status Gated() { return GatedNormForward(ctx_, Gating(), Flat(y_)); }
  absl::Status GatedBackward() {
    return GatedNormBackward(ctx_, Gating(), Flat(dy_), Flat(dx_), Flat(dgate_), dw_);
  }
  absl::Status AdamW() {
    const bool copied = AccumOf(dtype_) != dtype_;
    return AdamWUpdate(ctx_, {.lr = 1e-3},
                       {.param = param_,
                        .m = m_,
                        .v = v_,
                        .grad = grad_,
                        .gradient_scale = factor_,
                        .copy = copied ? y_.Reshaped({rows_ * columns_}) : TensorRef()});
  }

 private:
  TensorRef Flat(const TensorRef& x) const { return x.Reshaped({rows_, columns_}); }
  static HeadsRef Heads(const TensorRef& x) { return HeadsOf(x, 0, 1, x.dim(2)); }
  Conv1d Conv() const {
    return {.w = taps_, .bias = w_, .ages = ages_, .segments = {{0, rows_}}, .halo = halo_};
  }
  GatedNorm Gating() const { return {.x = Flat(x_), .gate = Flat(dy_), .w = w_, .groups = kGroups}; }

  Context& ctx_;
  DType dtype_;
  int64_t rows_, columns_;
  RopeFrequencies rope_ = MakeRopeFrequencies(1e4, kHeadDim, {});
  TensorRef wide_, dwide_, x_, y_, dy_, dx_, dgate_, w_, dw_, dbias_, taps_, dtaps_, halo_, dhalo_;
  TensorRef param_, m_, v_, grad_, positions_, ages_, factor_;
};

// Tensors of the pass's shape that it reads and writes, in the compute dtype; and in the accumulator dtype.
struct PassCase {
  PassKind kind;
  Pass pass;
  double touched, touched_wide;
  absl::Status (PassBench::*run)();
};
constexpr PassCase kCases[] = {
    {PassKind::kNorm, Pass::kForward, 2, 0, &PassBench::Norm},
    {PassKind::kNorm, Pass::kBackward, 4, 0, &PassBench::NormBackward},
    {PassKind::kActivation, Pass::kForward, 3, 0, &PassBench::Activation},
    {PassKind::kActivation, Pass::kBackward, 5, 0, &PassBench::ActivationBackward},
    {PassKind::kRope, Pass::kForward, 2, 0, &PassBench::Turn},
    {PassKind::kConvolution, Pass::kForward, 2, 0, &PassBench::Convolution},
    {PassKind::kConvolution, Pass::kBackward, 3, 0, &PassBench::ConvolutionBackward},
    {PassKind::kGatedNorm, Pass::kForward, 3, 0, &PassBench::Gated},
    {PassKind::kGatedNorm, Pass::kBackward, 5, 0, &PassBench::GatedBackward},
    {PassKind::kAdamW, Pass::kForward, 0, 7, &PassBench::AdamW},
};

// What the loss takes besides its three products, from so narrow ones that it is most of it. On GPUs it is
// near a copy.
absl::StatusOr<RatePoint> MeasureCrossEntropy(Context& ctx, Communicator& world, int64_t tokens) {
  constexpr int64_t kWidth = 16, kVocab = 1024;
  ArenaScope scope(ctx.scratch);
  Arena& arena = ctx.scratch;
  const auto x = RandomTensor(ctx, arena, DType::kF32, {tokens, kWidth}, 1);
  const auto w = RandomTensor(ctx, arena, DType::kF32, {kVocab, kWidth}, 2);
  for (const auto* made : {&x, &w}) ANNULUS_RETURN_IF_ERROR(world.AgreeOk(made->status()));
  const TensorRef dx = arena.Allocate(DType::kF32, x->shape()), dw = arena.Allocate(DType::kF32, w->shape());
  const TensorRef logits = arena.Allocate(DType::kF32, {tokens, kVocab});
  const TensorRef loss = arena.Allocate(DType::kF64, {1});
  for (const TensorRef& zeroed : {dw, loss}) ANNULUS_RETURN_IF_ERROR(Zero(ctx, zeroed));
  const TensorRef targets = Upload<int32_t>(ctx, arena, std::vector<int32_t>(static_cast<size_t>(tokens), 1));
  const double bytes = 2.0 * static_cast<double>(tokens * kVocab * SizeOf(DType::kF32));
  ANNULUS_ASSIGN_OR_RETURN(const RatePoint whole, MeasureRate(ctx, world, bytes, [&] {
                             return LinearCrossEntropyForwardBackward(ctx,
                                                                      {.x = *x, .w = *w, .targets = targets},
                                                                      {.scale = 1, .dx = dx, .dw = dw}, loss);
                           }));
  ANNULUS_ASSIGN_OR_RETURN(const RatePoint products, MeasureRate(ctx, world, bytes, [&]() -> absl::Status {
                             ANNULUS_RETURN_IF_ERROR(LinearForward(ctx, *x, *w, Write::kOverwrite, logits));
                             ANNULUS_RETURN_IF_ERROR(LinearBackwardWeight(ctx, logits, *x, dw));
                             return LinearBackwardInput(ctx, logits, *w, Write::kOverwrite, dx);
                           }));
  // A part of the whole at least: noise must not make it nothing.
  const double took = bytes / whole.per_second;
  return RatePoint{.size = bytes,
                   .per_second = Rounded(bytes / std::max(took - bytes / products.per_second, 0.2 * took))};
}

}  // namespace

absl::StatusOr<std::vector<PassRate>> MeasurePasses(Context& ctx, Communicator world,
                                                    CalibrationClock& clock) {
  const bool cpu = ctx.device.kind == DeviceKind::kCpu;
  const DType dtype = cpu ? DType::kF32 : DType::kBF16;
  const int64_t columns = cpu ? 256 : 4096;
  std::vector<PassRate> rates;
  for (const PassCase& c : kCases) rates.push_back({.kind = c.kind, .pass = c.pass, .bytes = {}});
  for (const int64_t rows : cpu ? std::vector<int64_t>{32, 256, 2048} : std::vector<int64_t>{32, 512, 8192}) {
    if (!rates[0].bytes.empty()) {
      ANNULUS_ASSIGN_OR_RETURN(const bool over, clock.Over());
      if (over) break;
    }
    ArenaScope scope(ctx.scratch);
    PassBench bench(ctx, dtype, rows, columns);
    ANNULUS_RETURN_IF_ERROR(world.AgreeOk(bench.Make()));
    for (size_t i = 0; i < rates.size(); ++i) {
      const PassCase& c = kCases[i];
      const auto wide = static_cast<double>(SizeOf(AccumOf(dtype))),
                 narrow = static_cast<double>(SizeOf(dtype));
      double bytes = bench.elements() * (c.touched * narrow + c.touched_wide * wide);
      if (c.kind == PassKind::kAdamW && !cpu) bytes += bench.elements() * narrow;  // the copy
      ANNULUS_ASSIGN_OR_RETURN(const RatePoint rate,
                               MeasureRate(ctx, world, bytes, [&] { return (bench.*c.run)(); }));
      rates[i].bytes.push_back(rate);
    }
  }
  if (!cpu) return rates;
  PassRate& loss = rates.emplace_back(PassRate{.kind = PassKind::kCrossEntropy, .bytes = {}});
  for (const int64_t tokens : {32, 256, 1024}) {
    if (!loss.bytes.empty()) {
      ANNULUS_ASSIGN_OR_RETURN(const bool over, clock.Over());
      if (over) break;
    }
    ANNULUS_ASSIGN_OR_RETURN(const RatePoint rate, MeasureCrossEntropy(ctx, world, tokens));
    loss.bytes.push_back(rate);
  }
  return rates;
}

}  // namespace annulus
