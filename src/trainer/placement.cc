#include "annulus/train/placement.h"

#include <algorithm>
#include <thread>

#include "annulus/base/host.h"
#include "annulus/comm/gpu_communicator.h"
#include "annulus/device/gpu.h"
#include "annulus/ops/attention.h"
#include "annulus/train/exchange.h"
#include "annulus/train/plan_exchange.h"
#include "annulus/train/report.h"
#include "annulus/train/trainer.h"

namespace annulus {

namespace {

bool MayBeGpu(const RunSpec& spec) {
  return spec.device == DeviceChoice::kAuto && spec.compute != ComputeType::kF64;
}

// Of a process by itself.
absl::Status ResolveAlone(int gpus, RunSpec* spec) {
  if (spec->device == DeviceChoice::kCuda && gpus == 0) {
    return absl::UnavailableError(
        absl::StrCat("device=CUDA: expected a GPU: ", WhyNoGpu(), " (device: CPU runs without)"));
  }
  if (spec->device == DeviceChoice::kAuto) {
    spec->device = gpus > 0 && MayBeGpu(*spec) ? DeviceChoice::kCuda : DeviceChoice::kCpu;
  }
  if (spec->device == DeviceChoice::kCpu &&
      (spec->parallel.exchange.transport == TransportChoice::kNccl ||
       spec->parallel.exchange.transport == TransportChoice::kCopyEngine)) {
    return Invalid("parallel.exchange.transport: expected BEST or HOST on CPUs; no GPU: ", WhyNoGpu());
  }
  return ResolveCompute(spec);
}

// Ranks that differ in what they compute on would wait for each other in different collectives.
absl::Status AgreeOnGpus(Communicator& world, int gpus) {
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<std::string> found, world.AllGatherStrings(absl::StrCat(gpus)));
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<std::string> hosts, world.AllGatherStrings(HostName()));
  const auto without = std::find(found.begin(), found.end(), "0");
  const auto with = std::find_if(found.begin(), found.end(), [](const auto& count) { return count != "0"; });
  if (without == found.end() || with == found.end()) return world.AgreeOk(absl::OkStatus());
  const auto rank = [&](auto at) {
    return absl::StrCat("rank ", at - found.begin(), " on ", hosts[static_cast<size_t>(at - found.begin())]);
  };
  return world.AgreeOk(Invalid("device=AUTO: ", rank(with), " finds a GPU, ", rank(without),
                               " none: expected device=CPU, or device=CUDA and a GPU for every rank"));
}

// Attention heads that no bf16 kernel takes, in words; empty: all are taken.
std::string UnsupportedInBf16(const ModelSpec& model) {
  const auto taken = [](int64_t dim, int64_t v_dim) {
    return AttentionSupports(DeviceKind::kCuda, DType::kBF16, dim, v_dim);
  };
  const int64_t dim = model.head_dim, latent_dim = model.latent.nope_dim + model.latent.rope_dim;
  if (Uses(model, BranchKind::kAttention) && !taken(dim, dim)) {
    return absl::StrCat("model.attention.head_dim=", dim,
                        ": expected 64 or 128 with compute=BF16 (compute: F32 takes any up to 256)");
  }
  if (Uses(model, BranchKind::kLatentAttention) && !taken(latent_dim, model.latent.v_dim)) {
    return absl::StrCat("model.latent: nope_dim + rope_dim=", latent_dim, ", v_dim=", model.latent.v_dim,
                        ": no kernel takes such heads with compute=BF16 (compute: F32 takes any up to 256)");
  }
  return "";
}

}  // namespace

absl::Status ResolveCompute(RunSpec* spec) {
  const bool gpu = spec->device == DeviceChoice::kCuda;
  const std::string unsupported = UnsupportedInBf16(spec->model);
  const bool bf16_heads = unsupported.empty();
  if (spec->compute == ComputeType::kAuto) {
    spec->compute = gpu && bf16_heads ? ComputeType::kBF16 : ComputeType::kF32;
  }
  if (spec->compute != ComputeType::kBF16) return absl::OkStatus();
  if (!gpu) return Invalid("compute=BF16: expected F32 or F64 on CPUs; no GPU: ", WhyNoGpu());
  if (bf16_heads) return absl::OkStatus();
  return Invalid(unsupported);
}

absl::Status ResolveDevice(Communicator world, int gpus, RunSpec* spec) {
  if (MayBeGpu(*spec)) ANNULUS_RETURN_IF_ERROR(AgreeOnGpus(world, gpus));
  return world.AgreeOk(ResolveAlone(gpus, spec));
}

absl::Status ResolvePlannedDevice(RunSpec* spec) {
  const TransportChoice transport = spec->parallel.exchange.transport;
  const bool gpu = spec->device == DeviceChoice::kCuda || spec->compute == ComputeType::kBF16 ||
                   transport == TransportChoice::kNccl || transport == TransportChoice::kCopyEngine;
  if (!gpu) return ResolveAlone(GpuCount(), spec);
  spec->device = DeviceChoice::kCuda;
  return ResolveCompute(spec);
}

DType DTypeOf(ComputeType compute) {
  ANNULUS_CHECK(compute != ComputeType::kAuto) << "compute type not resolved";
  if (compute == ComputeType::kF64) return DType::kF64;
  return compute == ComputeType::kBF16 ? DType::kBF16 : DType::kF32;
}

DeviceKind DeviceKindOf(DeviceChoice device) {
  ANNULUS_CHECK(device != DeviceChoice::kAuto) << "device not resolved";
  return device == DeviceChoice::kCuda ? DeviceKind::kCuda : DeviceKind::kCpu;
}

absl::StatusOr<Device> PlaceRank(Communicator world, const RunSpec& spec) {
  if (spec.device != DeviceChoice::kCuda) return Device{};
  const std::string host = HostName();
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<std::string> hosts, world.AllGatherStrings(host));
  const int64_t before = std::count(hosts.begin(), hosts.begin() + world.rank(), host);
  const Device device{DeviceKind::kCuda, static_cast<int>(before % GpuCount())};
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(UseGpu(device.index)));
  return device;
}

std::string DeviceName(Device device) {
  if (device.kind == DeviceKind::kCpu)
    return absl::StrCat("CPU, ", CountText(std::thread::hardware_concurrency(), "core"));
  const absl::StatusOr<GpuInfo> gpu = DescribeGpu(device.index);
  return gpu.ok() ? gpu->name : "GPU";
}

namespace {

// Bytes that can still be taken where this rank computes; -1 if unknown. And a name of that place, equal for
// the ranks that share it.
struct MemoryPlace {
  int64_t available = -1;
  std::string name;
};
absl::StatusOr<MemoryPlace> MemoryPlaceOf(Device device) {
  if (device.kind == DeviceKind::kCpu) return MemoryPlace{AvailableMemoryBytes(), HostName()};
  ANNULUS_ASSIGN_OR_RETURN(const GpuMemory memory, MemoryOfGpu());
  ANNULUS_ASSIGN_OR_RETURN(const GpuInfo gpu, DescribeGpu(device.index));
  return MemoryPlace{memory.free_bytes, absl::StrCat(HostName(), " ", gpu.name, " ", gpu.identity)};
}

}  // namespace

absl::Status CheckMemory(Communicator world, Device device, int64_t bytes, absl::string_view what,
                         absl::string_view cure) {
  const absl::StatusOr<MemoryPlace> place = MemoryPlaceOf(device);
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(place.status()));
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<std::string> places, world.AllGatherStrings(place->name));
  const int64_t ranks = std::count(places.begin(), places.end(), place->name);
  const int64_t available = place->available;
  if (available < 0 || bytes <= available / ranks) return world.AgreeOk(absl::OkStatus());
  const auto text = [](int64_t count) { return FormatBytes(static_cast<double>(count)); };
  return world.AgreeOk(absl::ResourceExhaustedError(
      absl::StrCat("memory: ", what, " ", text(bytes), ", expected at most ", text(available / ranks),
                   ", of the ", text(available), " that are available to ", CountText(ranks, "rank"), " on ",
                   place->name, ": ", cure)));
}

namespace {

// What the group can use, best first. On GPUs the host's way is for those that have no other.
absl::StatusOr<std::vector<TransportKind>> AvailableTransports(Communicator cp, const Context& ctx,
                                                               GpuLink link) {
  ANNULUS_ASSIGN_OR_RETURN(const TransportKind best, ChooseTransport(std::move(cp), ctx));
  std::vector<TransportKind> available = {best};
  if (best == TransportKind::kCopyEngine && link == GpuLink::kNccl) available.push_back(TransportKind::kNccl);
  return available;
}

}  // namespace

absl::StatusOr<Machine> SetUpMachine(Communicator world, const RunSpec& spec, Device device) {
  Machine machine;
  const Determinism determinism = spec.deterministic ? Determinism::kRequired : Determinism::kOff;
  machine.ctx = std::make_unique<Context>(device, determinism);
  machine.ctx->attention = spec.attention_kernel;
  const MeshShape shape{.dp = static_cast<int>(spec.parallel.dp),
                        .cp = static_cast<int>(spec.parallel.cp),
                        .tp = static_cast<int>(spec.parallel.tp)};
  ANNULUS_ASSIGN_OR_RETURN(machine.mesh, ProcessMesh::Create(shape, world));
  GpuLink link = GpuLink::kHost;
  if (device.kind == DeviceKind::kCuda) {
    ANNULUS_ASSIGN_OR_RETURN(link, ChooseGpuLink(world, *machine.ctx));
    ANNULUS_RETURN_IF_ERROR(machine.mesh.UseGpu(link, *machine.ctx));
  }
  std::vector<TransportKind> available;
  if (const auto asked = TransportOf(spec.parallel.exchange.transport); asked.has_value()) {
    available = {*asked};
  } else {
    ANNULUS_ASSIGN_OR_RETURN(available, AvailableTransports(machine.mesh.cp, *machine.ctx, link));
  }
  ANNULUS_ASSIGN_OR_RETURN(MachineProfile profile, ProfileOf(world, spec));
  machine.exchange = ExchangeOptionsOf(spec, std::move(available), std::move(profile));
  return machine;
}

absl::StatusOr<Machine> SetUpWatchedMachine(Communicator world, const RunSpec& spec, Device device) {
  const bool alone = world.size() == 1 && device.kind == DeviceKind::kCpu;
  if (alone || spec.step_deadline_seconds == 0) return SetUpMachine(world, spec, device);
  Watchdog::Options options{.deadline_seconds = spec.step_deadline_seconds,
                            .progress = Progress::kReports,
                            .world_rank = world.rank()};
  FlightRecorder start_up(Device{});
  start_up.Note("start-up", "communicators and memory", nullptr);
  options.recorder = &start_up;
  auto watchdog = std::make_unique<Watchdog>(options);
  absl::StatusOr<Machine> machine = SetUpMachine(world, spec, device);
  watchdog.reset();
  ANNULUS_RETURN_IF_ERROR(machine.status());
  options.recorder = &machine->ctx->recorder;
  options.watched = {machine->mesh.cp, machine->mesh.tp, machine->mesh.dp_cp};
  machine->watchdog = std::make_unique<Watchdog>(std::move(options));
  return machine;
}

// Rank 0's answer, which all ranks would give. Plans that cannot be are refused with their reasons once they
// are built; here they count as a KV ring.
absl::StatusOr<MemoryPlan> PlannedMemory(const RunSpec& spec, const Machine& machine) {
  Communicator world = machine.mesh.world;
  MemoryPlan plan;
  static_assert(std::is_trivially_copyable_v<MemoryPlan>);
  if (world.rank() == 0) {
    const absl::StatusOr<std::vector<PlannedPass>> passes =
        PlanExchange(spec, ExampleBatchOf(spec).sequences, machine.exchange);
    plan = PlanMemory(spec, passes.ok() ? PlannedExchangesOf(*passes) : PlannedExchanges());
  }
  const TensorRef bytes(&plan, DType::kU8, Device{}, {static_cast<int64_t>(sizeof(plan))});
  ANNULUS_RETURN_IF_ERROR(world.Broadcast(bytes, 0));
  const std::string cure =
      absl::StrCat("annulus plan shows of what; lower optim.micro_batch=", spec.optim.micro_batch,
                   ", data.seq_len=", spec.data.seq_len, " or the model, or use more ranks");
  ANNULUS_RETURN_IF_ERROR(
      CheckMemory(world, machine.ctx->device, plan.total(), "a rank is planned to hold", cure));
  return plan;
}

}  // namespace annulus
