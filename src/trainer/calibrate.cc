#include "annulus/train/calibrate.h"

#include <unistd.h>

#include <algorithm>

#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "annulus/base/file.h"
#include "annulus/device/gpu.h"
#include "annulus/ops/elementwise.h"
#include "annulus/train/placement.h"
#include "annulus/train/profile.h"
#include "annulus/train/report.h"
#include "calibrate_links.h"

namespace annulus {
namespace {

constexpr int64_t kKiB = int64_t{1} << 10, kMiB = int64_t{1} << 20;

absl::Status DescribeDevice(const Context& ctx, int ranks, MachineProfile* profile) {
  if (ctx.device.kind == DeviceKind::kCpu) {
    profile->device = DeviceName(ctx.device);
    profile->memory_bytes = sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE) / ranks;
    return absl::OkStatus();
  }
  ANNULUS_ASSIGN_OR_RETURN(const GpuInfo gpu, DescribeGpu(ctx.device.index));
  profile->device = gpu.name;
  profile->multiprocessors = gpu.multiprocessors;
  profile->compute_capability = 10 * gpu.compute_major + gpu.compute_minor;
  profile->peak_tflops = gpu.bf16_tflops;
  profile->memory_bytes = gpu.memory_bytes;
  return absl::OkStatus();
}

// In use besides the context's arenas, which is all that a calibration keeps: by CUDA, NCCL and libraries, on
// CPUs the program.
absl::StatusOr<int64_t> OtherMemoryBytes(const Context& ctx) {
  int64_t in_use = 0;
  if (ctx.device.kind == DeviceKind::kCuda) {
    ANNULUS_ASSIGN_OR_RETURN(const GpuMemory memory, MemoryOfGpu());
    in_use = memory.total_bytes - memory.free_bytes;
  } else {
    ANNULUS_ASSIGN_OR_RETURN(const std::string pages, ReadFile("/proc/self/statm"));  // all, resident, ..
    const std::vector<std::string> fields = absl::StrSplit(pages, ' ');
    if (fields.size() < 2 || !absl::SimpleAtoi(fields[1], &in_use))
      return absl::InternalError("/proc/self/statm: expected numbers of pages");
    in_use *= sysconf(_SC_PAGESIZE);
  }
  return std::max<int64_t>(0, in_use - ctx.scratch.capacity_bytes() - ctx.saved.capacity_bytes());
}

std::vector<CalibrationHeads> DefaultHeads(DeviceKind device) {
  if (device == DeviceKind::kCpu) {
    return {{.dtype = DType::kF32, .heads = 4, .kv_heads = 2, .head_dim = 32, .v_head_dim = 32},
            {.dtype = DType::kF32, .heads = 4, .kv_heads = 2, .head_dim = 16, .v_head_dim = 16},
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
    ANNULUS_ASSIGN_OR_RETURN(const RatePoint rate,
                             MeasureRate(ctx, world, 2.0 * static_cast<double>(bytes),
                                         [&] { return Copy(ctx, from.ref(), to.ref()); }));
    points.push_back(rate);
  }
  return points;
}

absl::StatusOr<double> MeasureLaunch(Context& ctx, Communicator world) {
  const Tensor x(ctx.device, DType::kF32, {1}), y(ctx.device, DType::kF32, {1});
  ANNULUS_ASSIGN_OR_RETURN(const RatePoint rate,
                           MeasureRate(ctx, world, 1, [&] { return AddInPlace(ctx, x.ref(), y.ref()); }));
  return Rounded(1 / rate.per_second);
}

std::string PointsText(const std::vector<RatePoint>& points, double unit, const char* format) {
  std::string text;
  for (const RatePoint& point : points) {
    absl::StrAppendFormat(&text, "  %s: %s", FormatCount(point.size),
                          absl::StrFormat("%.3g", point.per_second / unit));
  }
  return absl::StrCat(text, "  ", format);
}

const char* PassName(Pass pass) { return pass == Pass::kForward ? "forward" : "backward"; }

const char* Name(PassKind kind) {
  constexpr const char* kNames[] = {"move",        "norm",       "activation",    "rope",
                                    "convolution", "gated norm", "cross entropy", "AdamW"};
  return kNames[static_cast<size_t>(kind)];
}

const char* ShapeName(MaskShape shape) {
  return shape == MaskShape::kFull ? "full" : shape == MaskShape::kCausal ? "causal" : "masked";
}

void AppendLinks(const std::vector<LinkRate>& links, const std::vector<RatePoint>& collectives,
                 double collective_slowdown, std::string* text) {
  for (const LinkRate& link : links) {
    absl::StrAppendFormat(text, "%-18s message %.3g us, computing beside it x%.3g\n", Name(link.transport),
                          link.message_seconds * 1e6, link.computing_slowdown);
    absl::StrAppendFormat(text, "  one way          %s\n", PointsText(link.one_way, 1e9, "GB/s by bytes"));
    absl::StrAppendFormat(text, "  both ways        %s\n", PointsText(link.both_ways, 1e9, "GB/s by bytes"));
  }
  if (collectives.empty()) return;
  absl::StrAppendFormat(text, "collectives        computing beside them x%.3g\n", collective_slowdown);
  absl::StrAppendFormat(text, "  rates            %s\n", PointsText(collectives, 1e9, "GB/s by bytes sent"));
}

}  // namespace

absl::StatusOr<MachineProfile> Calibrate(Machine& machine, const CalibrationOptions& options) {
  Context& ctx = *machine.ctx;
  Communicator& world = machine.mesh.world;
  ANNULUS_ASSIGN_OR_RETURN(const HostGroups groups, GroupByHosts(machine.mesh.cp, options.host));
  MachineProfile profile;
  profile.measured = true;
  profile.ranks = 1;
  ANNULUS_RETURN_IF_ERROR(DescribeDevice(ctx, world.size(), &profile));
  CalibrationClock clock(world, options.seconds);
  options.progress("copies and launches");
  ANNULUS_ASSIGN_OR_RETURN(profile.copy, MeasureCopies(ctx, world));
  ANNULUS_ASSIGN_OR_RETURN(profile.launch_seconds, MeasureLaunch(ctx, world));
  options.progress("products");
  ANNULUS_ASSIGN_OR_RETURN(const ProductRates products, MeasureProducts(ctx, world, clock));
  profile.products = products.forward, profile.product_gradients = products.gradients;
  options.progress("passes");
  ANNULUS_ASSIGN_OR_RETURN(profile.passes, MeasurePasses(ctx, world, clock));
  options.progress("scans");
  ANNULUS_ASSIGN_OR_RETURN(profile.scans, MeasureScans(ctx, world, clock));
  const std::vector<CalibrationHeads> all =
      options.heads.empty() ? DefaultHeads(ctx.device.kind) : options.heads;
  if (machine.mesh.cp.size() > 1) {
    options.progress("links");
    ANNULUS_RETURN_IF_ERROR(MeasureLinks(machine, groups, all.front(), &profile));
  }
  for (const CalibrationHeads& heads : all) {
    options.progress(absl::StrCat("attention, ", Name(heads.dtype), ", heads of ", heads.head_dim));
    ANNULUS_ASSIGN_OR_RETURN(const std::vector<AttentionRate> rates,
                             MeasureAttention(ctx, world, heads, profile.multiprocessors, clock));
    profile.attention.insert(profile.attention.end(), rates.begin(), rates.end());
  }
  const absl::StatusOr<int64_t> other = OtherMemoryBytes(ctx);
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(other.status()));
  ANNULUS_ASSIGN_OR_RETURN(const double most,
                           world.AllReduceValue(static_cast<double>(*other), ReduceOp::kMax));
  profile.other_memory_bytes = static_cast<int64_t>(most);
  // Between hosts one rank of each has measured.
  ANNULUS_ASSIGN_OR_RETURN(const std::string text, world.BroadcastString(ProfileText(profile), 0));
  return ParseProfile("calibration", text);
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
  for (const PassRate& rate : profile.passes) {
    absl::StrAppendFormat(&text, "%-13s %-8s%s\n", Name(rate.kind), PassName(rate.pass),
                          PointsText(rate.bytes, 1e9, "GB/s by bytes"));
  }
  for (const ScanRate& rate : profile.scans) {
    absl::StrAppendFormat(&text, "%-10s %-8s%s\n", rate.kernel == ScanKernel::kSsd ? "SSD" : "delta rule",
                          PassName(rate.pass), PointsText(rate.updates, 1e9, "G updates/s by updates"));
  }
  absl::StrAppendFormat(&text, "memory             %s, of it %s besides what runs plan\n",
                        FormatBytes(static_cast<double>(profile.memory_bytes)),
                        FormatBytes(static_cast<double>(profile.other_memory_bytes)));
  AppendLinks(profile.links, profile.collectives, profile.collective_slowdown, &text);
  if (profile.network != NetworkProfile()) {
    const NetworkProfile& network = profile.network;
    absl::StrAppend(&text, "between hosts of ", CountText(network.ranks_per_host, "rank"));
    if (network.host_bytes_per_second > 0)
      absl::StrAppendFormat(&text, ", together %.3g GB/s", network.host_bytes_per_second / 1e9);
    absl::StrAppend(&text, "\n");
    AppendLinks(network.links, network.collectives, network.collective_slowdown, &text);
  }
  for (const AttentionRate& rate : profile.attention) {
    const std::string dims = rate.head_dim == rate.v_head_dim
                                 ? absl::StrCat(rate.head_dim)
                                 : absl::StrCat(rate.head_dim, "/", rate.v_head_dim);
    absl::StrAppendFormat(&text, "%-9s %-7s %-6s %-8s%s\n", Name(rate.kernel), dims, ShapeName(rate.shape),
                          PassName(rate.pass), PointsText(rate.pairs, 1e9, "G pairs/s by pairs of tiles"));
  }
  return text;
}

}  // namespace annulus
