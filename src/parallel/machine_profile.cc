#include "annulus/parallel/machine_profile.h"

#include <algorithm>
#include <cmath>

#include "annulus/base/check.h"
#include "plan_cost.h"

namespace annulus {
namespace {

constexpr double kKiB = 1024, kMiB = 1024 * kKiB;

double Rounded(double value) {
  const double unit = std::pow(10.0, std::floor(std::log10(value)) - 2);
  return std::round(value / unit) * unit;
}

// The rates of work that takes start + size / per_second, to three digits.
std::vector<RatePoint> WithStart(double start, double per_second, std::vector<double> sizes) {
  std::vector<RatePoint> points;
  for (const double size : sizes) points.push_back({size, Rounded(size / (start + size / per_second))});
  return points;
}

// Measured TFLOP/s of long causal blocks, one call.
struct HopperRate {
  int64_t head_dim, v_head_dim;
  double cudnn_forward, cudnn_backward;
  double own_forward, own_backward, own_ordered_backward;           // on every GPU
  double hopper_forward, hopper_backward, hopper_ordered_backward;  // those for Hopper
};
constexpr HopperRate kHopper[] = {{64, 64, 474, 412, 342, 241, 200, 549, 468, 428},
                                  {128, 128, 620, 535, 409, 320, 265, 710, 540, 472},
                                  {192, 128, 603, 483, 432, 283, 234, 728, 457, 457}};
// A call takes this long besides its work: filling the device, and the tail where it empties.
constexpr double kForwardStart = 12e-6, kBackwardStart = 25e-6;

AttentionRate HopperCall(AttentionKernel kernel, Pass pass, MaskShape shape, const HopperRate& dims,
                         double tflops) {
  const double start = pass == Pass::kForward ? kForwardStart : kBackwardStart;
  return {.kernel = kernel,
          .pass = pass,
          .shape = shape,
          .head_dim = dims.head_dim,
          .v_head_dim = dims.v_head_dim,
          .pairs = WithStart(start, tflops * 1e12 / FlopsPerPair(pass, dims.head_dim, dims.v_head_dim),
                             {1e6, 1e7, 3e7, 1e8, 3e8, 1e9, 3e9, 1e10})};
}

constexpr MaskShape kShapes[] = {MaskShape::kGeneral, MaskShape::kFull, MaskShape::kCausal};

std::vector<AttentionRate> HopperAttention() {
  std::vector<AttentionRate> rates;
  for (const HopperRate& dims : kHopper) {
    for (const MaskShape shape : {MaskShape::kFull, MaskShape::kCausal}) {
      rates.push_back(HopperCall(AttentionKernel::kCudnn, Pass::kForward, shape, dims, dims.cudnn_forward));
      rates.push_back(HopperCall(AttentionKernel::kCudnn, Pass::kBackward, shape, dims, dims.cudnn_backward));
    }
    for (const MaskShape shape : kShapes) {
      const auto own = [&](AttentionKernel kernel, double forward, double backward, double ordered) {
        rates.push_back(HopperCall(kernel, Pass::kForward, shape, dims, forward));
        rates.push_back(HopperCall(kernel, Pass::kBackward, shape, dims, backward));
        rates.push_back(HopperCall(kernel, Pass::kBackward, shape, dims, ordered));
        rates.back().determinism = Determinism::kRequired;
      };
      own(AttentionKernel::kTensorCore, dims.own_forward, dims.own_backward, dims.own_ordered_backward);
      own(AttentionKernel::kHopper, dims.hopper_forward, dims.hopper_backward, dims.hopper_ordered_backward);
    }
  }
  // Not measured: for parity only.
  constexpr double kF32Tflops = 15;
  for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
    rates.push_back(HopperCall(AttentionKernel::kF32, pass, MaskShape::kGeneral, kHopper[1], kF32Tflops));
  }
  return rates;
}

// bf16, 256 to 16384 latents of 512 columns for 128 heads of 128 + 128.
ProductRates HopperProducts() {
  return {
      .forward = {{1e9, 139e12}, {8.59e9, 464e12}, {3.44e10, 597e12}, {1.37e11, 644e12}, {5.5e11, 659e12}},
      .gradients = {{2e9, 35e12}, {1.72e10, 225e12}, {6.87e10, 528e12}, {2.75e11, 714e12}, {1.1e12, 768e12}}};
}

// Not measured.
constexpr double kCpuFlops = 20e9;
ProductRates CpuProducts() { return {.forward = {{1e6, kCpuFlops}}, .gradients = {{1e6, kCpuFlops}}}; }

}  // namespace

double RateAt(const std::vector<RatePoint>& points, double size) {
  ANNULUS_CHECK(!points.empty()) << "no rates";
  if (size <= points.front().size) return points.front().per_second;
  const auto above =
      std::find_if(points.begin(), points.end(), [&](const RatePoint& point) { return point.size >= size; });
  if (above == points.end()) return points.back().per_second;
  const RatePoint &low = *(above - 1), &high = *above;
  const double part = std::log(size / low.size) / std::log(high.size / low.size);
  return low.per_second + part * (high.per_second - low.per_second);
}

bool RunsHopperKernels(const MachineProfile& machine) {
  if (machine.compute_capability > 0) return machine.compute_capability == 90;
  return std::any_of(machine.attention.begin(), machine.attention.end(),
                     [](const AttentionRate& rate) { return rate.kernel == AttentionKernel::kHopper; });
}

ProductRates ProductRatesOf(const MachineProfile& machine, DeviceKind device, DType dtype) {
  const bool gpu = device == DeviceKind::kCuda;
  const bool known = !machine.products.empty() && !machine.product_gradients.empty();
  ProductRates rates = gpu ? HopperProducts() : CpuProducts();
  if (known) rates = {.forward = machine.products, .gradients = machine.product_gradients};
  // Peaks of Hopper by its datasheet: 67 TFLOP/s in f32, 989 in bf16; a CPU's f64 is half of its f32.
  double share = 1;
  if (gpu && dtype == DType::kF32) share = 67.0 / 989;
  if (!gpu && dtype == DType::kF64) share = 0.5;
  for (std::vector<RatePoint>* points : {&rates.forward, &rates.gradients}) {
    for (RatePoint& point : *points) point.per_second *= share;
  }
  return rates;
}

// What was not measured (messages below 1 MiB, passes below 512 MiB, starts of kernels, the smallest
// products, the host's transport) follows from the time that the smallest measured ones take besides their
// bytes.
MachineProfile AssumedHopper() {
  MachineProfile profile{.device = "NVIDIA H200, NVLink",
                         .measured = false,
                         .ranks = 4,
                         .multiprocessors = 132,
                         .compute_capability = 90,
                         .attention = HopperAttention(),
                         .links = {},
                         .copy = WithStart(2e-6, 3.7e12, {kMiB, 4 * kMiB, 16 * kMiB, 64 * kMiB, 512 * kMiB}),
                         .launch_seconds = 4e-6};
  profile.products = HopperProducts().forward;
  profile.product_gradients = HopperProducts().gradients;
  const std::vector<RatePoint> copy_engine = {
      {64 * kKiB, 5.6e9}, {kMiB, 75e9}, {16 * kMiB, 301e9}, {128 * kMiB, 377e9}};
  const std::vector<RatePoint> nccl = {
      {64 * kKiB, 3.5e9}, {kMiB, 35e9}, {16 * kMiB, 73e9}, {128 * kMiB, 163e9}};
  const std::vector<RatePoint> host = {{64 * kKiB, 1.2e9}, {kMiB, 7e9}, {16 * kMiB, 10e9}};
  // One egress for all peers: two together get what one would.
  profile.links = {{TransportKind::kCopyEngine, copy_engine, copy_engine, 15e-6, 1.0},
                   {TransportKind::kNccl, nccl, nccl, 25e-6, 1.06},
                   {TransportKind::kHost, host, host, 60e-6, 1.0}};
  // Measured: 80 heads of 64, a state of 128, 512 to 32768 tokens; 16 heads of 128 x 128; two ranks.
  profile.scans = {
      {ScanKernel::kSsd,
       Pass::kForward,
       {{3.36e8, 6.15e12}, {1.34e9, 11.8e12}, {5.37e9, 23.4e12}, {2.15e10, 30.1e12}}},
      {ScanKernel::kSsd,
       Pass::kBackward,
       {{3.36e8, 3.28e12}, {1.34e9, 7.74e12}, {5.37e9, 11.6e12}, {2.15e10, 13e12}}},
      {ScanKernel::kDeltaRule, Pass::kForward, {{1.34e8, 434e9}, {5.37e8, 552e9}, {2.15e9, 593e9}}},
      {ScanKernel::kDeltaRule, Pass::kBackward, {{1.34e8, 164e9}, {5.37e8, 219e9}, {2.15e9, 226e9}}}};
  profile.passes = {
      {PassKind::kConvolution, Pass::kForward, {{5.2e5, 76e9}, {8.4e6, 1.14e12}, {1.34e8, 2.8e12}}},
      {PassKind::kConvolution, Pass::kBackward, {{7.9e5, 53e9}, {1.26e7, 582e9}, {2.01e8, 2.09e12}}}};
  profile.collectives = {
      {64 * kKiB, 6.42e9}, {512 * kKiB, 31.9e9}, {4 * kMiB, 103e9}, {32 * kMiB, 187e9}, {256 * kMiB, 221e9}};
  profile.peak_tflops = 989.4;
  profile.memory_bytes = int64_t{141} * 1000000000;
  profile.other_memory_bytes = int64_t{1500} << 20;
  return profile;
}

MachineProfile AssumedCpuCore() {
  constexpr double kBytes = 5e9;
  constexpr int64_t kHeadDim = 64;
  MachineProfile profile{.device = "CPU, one core a rank",
                         .measured = false,
                         .ranks = 2,
                         .attention = {},
                         .links = {{TransportKind::kHost, {{kMiB, kBytes}}, {{kMiB, kBytes}}, 20e-6, 1.0}},
                         .copy = {{kMiB, kBytes}},
                         .launch_seconds = 0,
                         .products = CpuProducts().forward,
                         .product_gradients = CpuProducts().gradients};
  profile.collectives = WithStart(20e-6, kBytes, {16 * kKiB, 128 * kKiB, kMiB, 16 * kMiB});
  for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
    const double slower = pass == Pass::kForward ? 1 : 3;
    profile.scans.push_back({ScanKernel::kSsd, pass, {{1e6, Rounded(5e8 / slower)}}});
    profile.scans.push_back({ScanKernel::kDeltaRule, pass, {{1e6, Rounded(3e8 / slower)}}});
    profile.attention.push_back({.kernel = AttentionKernel::kCpuTiles,
                                 .pass = pass,
                                 .shape = MaskShape::kGeneral,
                                 .head_dim = kHeadDim,
                                 .v_head_dim = kHeadDim,
                                 .pairs = {{1e6, kCpuFlops / FlopsPerPair(pass, kHeadDim, kHeadDim)}}});
  }
  return profile;
}

}  // namespace annulus
