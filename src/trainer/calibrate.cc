#include "annulus/train/calibrate.h"

#include <algorithm>
#include <thread>

#include "absl/strings/str_format.h"
#include "annulus/comm/exchange_bench.h"
#include "annulus/device/gpu.h"
#include "annulus/ops/elementwise.h"
#include "annulus/train/measure.h"
#include "annulus/train/report.h"
#include "calibrate_kernels.h"

namespace annulus {
namespace {

constexpr int64_t kKiB = int64_t{1} << 10, kMiB = int64_t{1} << 20;

absl::Status DescribeDevice(const Context& ctx, MachineProfile* profile) {
  if (ctx.device.kind == DeviceKind::kCpu) {
    profile->device = absl::StrCat("CPU, ", std::thread::hardware_concurrency(), " cores");
    return absl::OkStatus();
  }
  ANNULUS_ASSIGN_OR_RETURN(const GpuInfo gpu, DescribeGpu(ctx.device.index));
  profile->device = gpu.name;
  profile->multiprocessors = gpu.multiprocessors;
  return absl::OkStatus();
}

std::vector<CalibrationHeads> DefaultHeads(DeviceKind device) {
  if (device == DeviceKind::kCpu) {
    return {{.dtype = DType::kF32, .heads = 4, .kv_heads = 2, .head_dim = 32, .v_head_dim = 32},
            {.dtype = DType::kF32, .heads = 4, .kv_heads = 2, .head_dim = 128, .v_head_dim = 128}};
  }
  return {{.dtype = DType::kBF16, .heads = 16, .kv_heads = 8, .head_dim = 128, .v_head_dim = 128},
          {.dtype = DType::kBF16, .heads = 16, .kv_heads = 8, .head_dim = 64, .v_head_dim = 64},
          {.dtype = DType::kF32, .heads = 4, .kv_heads = 4, .head_dim = 64, .v_head_dim = 64}};
}

// Bytes read and written by a copy.
absl::StatusOr<std::vector<RatePoint>> MeasureCopies(Context& ctx, Communicator world) {
  const int64_t most = ctx.device.kind == DeviceKind::kCpu ? 16 * kMiB : 256 * kMiB;
  std::vector<RatePoint> points;
  for (int64_t bytes = 64 * kKiB; bytes <= most; bytes *= 16) {
    const Tensor from(ctx.device, DType::kF32, {bytes / 4}), to(ctx.device, DType::kF32, {bytes / 4});
    const int64_t calls = std::clamp<int64_t>(16 * kMiB / bytes, 1, 16);
    ANNULUS_ASSIGN_OR_RETURN(const double seconds,
                             SecondsOf(ctx, world, {.timed = 5, .calls = calls, .take = StatisticFor(ctx)},
                                       [&] { return Copy(ctx, from.ref(), to.ref()); }));
    const double touched = 2.0 * static_cast<double>(bytes);
    points.push_back({.size = touched, .per_second = Rounded(touched / seconds)});
  }
  return points;
}

absl::StatusOr<double> MeasureLaunch(Context& ctx, Communicator world) {
  constexpr int64_t kLaunches = 200;
  const Tensor x(ctx.device, DType::kF32, {1}), y(ctx.device, DType::kF32, {1});
  ANNULUS_ASSIGN_OR_RETURN(const double seconds,
                           SecondsOf(ctx, world, {.timed = 5, .calls = kLaunches, .take = StatisticFor(ctx)},
                                     [&] { return AddInPlace(ctx, x.ref(), y.ref()); }));
  return Rounded(seconds);
}

// Of one transport. `compute` is what its messages may slow down.
absl::StatusOr<LinkRate> MeasureLink(Context& ctx, Communicator cp, ExchangeTransport& transport,
                                     const std::function<absl::Status()>& compute) {
  constexpr int kRepeats = 5;
  constexpr double kLongSeconds = 2e-3;  // a message that takes as long is at its full rate
  const bool cpu = ctx.device.kind == DeviceKind::kCpu;
  LinkRate link{.transport = transport.kind(), .one_way = {}, .both_ways = {}};
  for (int64_t bytes = 4 * kKiB; bytes <= (cpu ? 4 : 256) * kMiB; bytes *= 4) {
    ANNULUS_ASSIGN_OR_RETURN(const ExchangeRate rate, MeasureExchange(ctx, cp, transport, bytes, kRepeats));
    const double one_way = rate.one_way_gb_per_second * 1e9, both_ways = rate.both_ways_gb_per_second * 1e9;
    link.one_way.push_back({.size = static_cast<double>(bytes), .per_second = Rounded(one_way)});
    // Half of the bytes went each way.
    link.both_ways.push_back({.size = static_cast<double>(bytes / 2), .per_second = Rounded(both_ways)});
    if (static_cast<double>(bytes) > kLongSeconds * std::min(one_way, both_ways)) break;
  }
  ANNULUS_ASSIGN_OR_RETURN(const double seconds, MeasureMessageSeconds(ctx, cp, transport, kRepeats));
  link.message_seconds = Rounded(seconds);
  ANNULUS_ASSIGN_OR_RETURN(link.computing_slowdown,
                           MeasureSlowdown(ctx, cp, transport, cpu ? kMiB : 16 * kMiB, compute, kRepeats));
  link.computing_slowdown = Rounded(link.computing_slowdown);
  return link;
}

// Of every transport that the group can use.
absl::StatusOr<std::vector<LinkRate>> MeasureLinks(Machine& machine, const CalibrationHeads& heads) {
  Context& ctx = *machine.ctx;
  ArenaScope scope(ctx.scratch);
  CalibrationBlock block(ctx, heads, ctx.device.kind == DeviceKind::kCpu ? 256 : 8192);
  ANNULUS_RETURN_IF_ERROR(machine.mesh.cp.AgreeOk(block.Make()));
  block.Mask(MaskShape::kFull);
  std::vector<LinkRate> links;
  for (const TransportKind kind : machine.exchange.available) {
    ANNULUS_ASSIGN_OR_RETURN(const std::unique_ptr<ExchangeTransport> transport,
                             MakeTransport(kind, machine.mesh.cp, ctx));
    ANNULUS_ASSIGN_OR_RETURN(const LinkRate link, MeasureLink(ctx, machine.mesh.cp, *transport, [&] {
                               return block.RunWhole(Pass::kForward);
                             }));
    links.push_back(link);
  }
  return links;
}

std::string PointsText(const std::vector<RatePoint>& points, double unit, const char* format) {
  std::string text;
  for (const RatePoint& point : points) {
    absl::StrAppendFormat(&text, "  %s: %s", FormatCount(point.size),
                          absl::StrFormat("%.3g", point.per_second / unit));
  }
  return absl::StrCat(text, "  ", format);
}

const char* ShapeName(MaskShape shape) {
  return shape == MaskShape::kFull ? "full" : shape == MaskShape::kCausal ? "causal" : "masked";
}

}  // namespace

absl::StatusOr<MachineProfile> Calibrate(Machine& machine, const CalibrationOptions& options) {
  Context& ctx = *machine.ctx;
  Communicator& world = machine.mesh.world;
  MachineProfile profile;
  profile.measured = true;
  profile.ranks = machine.mesh.cp.size();
  ANNULUS_RETURN_IF_ERROR(DescribeDevice(ctx, &profile));
  CalibrationClock clock(world, options.seconds);
  options.progress("copies and launches");
  ANNULUS_ASSIGN_OR_RETURN(profile.copy, MeasureCopies(ctx, world));
  ANNULUS_ASSIGN_OR_RETURN(profile.launch_seconds, MeasureLaunch(ctx, world));
  options.progress("products");
  ANNULUS_ASSIGN_OR_RETURN(const ProductRates products, MeasureProducts(ctx, world));
  profile.products = products.forward, profile.product_gradients = products.gradients;
  const std::vector<CalibrationHeads> all =
      options.heads.empty() ? DefaultHeads(ctx.device.kind) : options.heads;
  if (machine.mesh.cp.size() > 1) {
    options.progress("links");
    ANNULUS_ASSIGN_OR_RETURN(profile.links, MeasureLinks(machine, all.front()));
  }
  for (const CalibrationHeads& heads : all) {
    options.progress(absl::StrCat("attention, ", Name(heads.dtype), ", heads of ", heads.head_dim));
    ANNULUS_ASSIGN_OR_RETURN(const std::vector<AttentionRate> rates,
                             MeasureAttention(ctx, world, heads, profile.multiprocessors, clock));
    profile.attention.insert(profile.attention.end(), rates.begin(), rates.end());
  }
  return profile;
}

std::string ProfileTable(const MachineProfile& profile) {
  std::string text = absl::StrCat(profile.device, ", ", profile.measured ? "measured" : "assumed", ", ",
                                  CountText(profile.ranks, "rank"), "\n");
  absl::StrAppendFormat(&text, "launch             %.3g us\n", profile.launch_seconds * 1e6);
  absl::StrAppendFormat(&text, "copy               %s\n", PointsText(profile.copy, 1e9, "GB/s by bytes"));
  absl::StrAppendFormat(&text, "products           %s\n",
                        PointsText(profile.products, 1e12, "TFLOP/s by FLOPs"));
  absl::StrAppendFormat(&text, "  gradients        %s\n",
                        PointsText(profile.product_gradients, 1e12, "TFLOP/s by FLOPs"));
  for (const LinkRate& link : profile.links) {
    absl::StrAppendFormat(&text, "%-18s message %.3g us, computing beside it x%.3g\n", Name(link.transport),
                          link.message_seconds * 1e6, link.computing_slowdown);
    absl::StrAppendFormat(&text, "  one way          %s\n", PointsText(link.one_way, 1e9, "GB/s by bytes"));
    absl::StrAppendFormat(&text, "  both ways        %s\n", PointsText(link.both_ways, 1e9, "GB/s by bytes"));
  }
  for (const AttentionRate& rate : profile.attention) {
    const std::string dims = rate.head_dim == rate.v_head_dim
                                 ? absl::StrCat(rate.head_dim)
                                 : absl::StrCat(rate.head_dim, "/", rate.v_head_dim);
    absl::StrAppendFormat(&text, "%-9s %-7s %-6s %-8s%s\n", Name(rate.kernel), dims, ShapeName(rate.shape),
                          rate.pass == Pass::kForward ? "forward" : "backward",
                          PointsText(rate.pairs, 1e9, "G pairs/s by pairs of tiles"));
  }
  return text;
}

}  // namespace annulus
