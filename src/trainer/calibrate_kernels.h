#pragma once

// Rates of block kernels, as a cost model needs them.

#include "annulus/train/calibrate.h"
#include "annulus/train/measure.h"

namespace annulus {

// Clock of a calibration that all ranks read alike.
class CalibrationClock {
 public:
  CalibrationClock(Communicator world, double seconds);
  // Whether the time is over on any rank. Collective.
  absl::StatusOr<bool> Over();

 private:
  Communicator world_;
  double end_;
};

// A block of as many queries as keys, whose kernels run alone; memory of the context's scratch arena.
class CalibrationBlock {
 public:
  CalibrationBlock(Context& ctx, const CalibrationHeads& heads, int64_t rows);
  absl::Status Make();         // operands; before all else
  void Mask(MaskShape shape);  // of the calls that follow
  // Of a call of the kernel with that mask.
  double Work(AttentionKernel kernel, Pass pass, int multiprocessors) const;
  absl::Status PrepareBackward();
  // One call, as the rates of a profile want it (AttentionRate).
  absl::Status Run(Pass pass, AttentionKernel kernel);
  absl::Status RunWhole(Pass pass);

 private:
  HeadsRef Out(const TensorRef& x) const;
  HeadsRef K(const TensorRef& x) const;
  HeadsRef V(const TensorRef& x) const;
  AttentionBlock Operands() const;

  Context& ctx_;
  CalibrationHeads heads_;
  int64_t rows_;
  MaskShape shape_ = MaskShape::kFull;
  std::vector<int64_t> lo_, hi_;
  MaskBounds bounds_;
  TensorRef q_, kv_, out_, dout_, lse_, delta_, dq_, dkv_;
  TensorRef sum_out_, sum_lse_, sum_dq_, sum_dkv_;  // in the accumulator dtype, of calls that add
};

// Every kernel that serves a block of these heads on the context's device, each pass and mask shape.
absl::StatusOr<std::vector<AttentionRate>> MeasureAttention(Context& ctx, Communicator world,
                                                            const CalibrationHeads& heads,
                                                            int multiprocessors, CalibrationClock& clock);

// Of products as layers have them, and of both of their gradients.
absl::StatusOr<ProductRates> MeasureProducts(Context& ctx, Communicator world, CalibrationClock& clock);

absl::StatusOr<std::vector<PassRate>> MeasurePasses(Context& ctx, Communicator world,
                                                    CalibrationClock& clock);
absl::StatusOr<std::vector<ScanRate>> MeasureScans(Context& ctx, Communicator world, CalibrationClock& clock);

// size / seconds of a call, as calls behind each other take in the long run.
absl::StatusOr<RatePoint> MeasureRate(Context& ctx, Communicator& world, double size,
                                      const std::function<absl::Status()>& call);

// To four digits: what is measured is not known better.
double Rounded(double value);

}  // namespace annulus
