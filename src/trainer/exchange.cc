#include "annulus/train/exchange.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include "annulus/base/file.h"
#include "annulus/model/params.h"
#include "annulus/train/batch.h"
#include "annulus/train/placement.h"
#include "annulus/train/profile.h"
#include "annulus/train/report.h"

namespace annulus {
namespace {

PlanKind KindOf(PlanName plan) {
  switch (plan) {
    case PlanName::kAllGather:
      return PlanKind::kAllGather;
    case PlanName::kBidirectionalKvRing:
      return PlanKind::kBidirectionalKvRing;
    case PlanName::kDirectCast:
      return PlanKind::kDirectCast;
    case PlanName::kTokenRing:
      return PlanKind::kTokenRing;
    case PlanName::kBidirectionalTokenRing:
      return PlanKind::kBidirectionalTokenRing;
    case PlanName::kBalanced:
      return PlanKind::kBalanced;
    case PlanName::kDoubleRing:
      return PlanKind::kDoubleRing;
    case PlanName::kMesh:
      return PlanKind::kMesh;
    case PlanName::kArena:
      return PlanKind::kArena;
    case PlanName::kKvRing:
    case PlanName::kAuto:
    case PlanName::kUlysses:  // the ring between one group of all ranks: none
      return PlanKind::kKvRing;
  }
  return PlanKind::kKvRing;
}

bool ReadsInner(PlanKind kind) { return kind == PlanKind::kDoubleRing || kind == PlanKind::kMesh; }

// Plans of the named kind, or all, before the fields that any plan has.
std::vector<PlanChoice> BaseChoices(const PassPlanSpec& spec, int ranks, int64_t heads) {
  if (ranks == 1) return {{}};  // nothing is exchanged
  std::vector<PlanChoice> all = AllChoices(ranks, heads);
  const auto inner = static_cast<int>(spec.inner), given_split = static_cast<int>(spec.head_split);
  if (spec.plan == PlanName::kAuto) {
    std::erase_if(all, [&](const PlanChoice& choice) {
      return (given_split > 0 && choice.head_split != given_split) ||
             (inner > 0 && ReadsInner(choice.kind) && choice.inner != inner);
    });
    return all;
  }
  const PlanKind kind = KindOf(spec.plan);
  const int split = spec.plan == PlanName::kUlysses ? ranks : std::max(1, given_split);
  if (!ReadsInner(kind)) return {{.kind = kind, .head_split = split}};
  if (inner > 0) return {{.kind = kind, .head_split = split, .inner = inner}};
  std::erase_if(all,
                [&](const PlanChoice& choice) { return choice.kind != kind || choice.head_split != split; });
  // No divisor between: all places share one node, or one tile row.
  if (all.empty()) all.push_back({.kind = kind, .head_split = split, .inner = ranks / split});
  return all;
}

// Of a tensor-parallel rank: what all attention layers have, so that a plan that splits heads can serve each.
int64_t HeadsToSplit(const RunSpec& spec) {
  const int64_t tp = spec.parallel.tp;
  int64_t heads = 0;
  for (const LayerSpec& layer : spec.model.layers) {
    for (const BranchSpec& branch : layer.branches) {
      if (branch.kind == BranchKind::kAttention) heads = std::gcd(heads, spec.model.heads / tp);
      if (branch.kind != BranchKind::kLatentAttention) continue;
      const LatentShard shard =
          LatentShardOf({.rank = 0, .size = static_cast<int>(tp)}, branch.latent_groups);
      heads = std::gcd(heads, spec.model.latent.heads / shard.head_groups);
    }
  }
  return heads;
}

MachineProfile AssumedProfile(DeviceKind device) {
  return device == DeviceKind::kCuda ? AssumedHopper() : AssumedCpuCore();
}

// Kernels of another device say nothing about this one's.
absl::Status CheckProfile(const MachineProfile& machine, const RunSpec& spec) {
  const bool cpu = DeviceKindOf(spec.device) == DeviceKind::kCpu;
  for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
    const bool found =
        std::any_of(machine.attention.begin(), machine.attention.end(), [&](const AttentionRate& rate) {
          return rate.pass == pass && (rate.kernel == AttentionKernel::kCpuTiles) == cpu;
        });
    if (found) continue;
    return Invalid("parallel.exchange.profile=", spec.parallel.exchange.profile, ": device: \"",
                   machine.device, "\": expected attention of ",
                   cpu ? "CPUs (kernel: CPU_TILES)" : "GPUs (kernel: HOPPER, CUDNN, CUDA_MMA or CUDA_F32)",
                   ", ", Name(pass), ", as the run is on ", cpu ? "CPUs" : "GPUs");
  }
  return absl::OkStatus();
}

absl::StatusOr<MachineProfile> ParseProfileFor(const RunSpec& spec, const std::string& text) {
  ANNULUS_ASSIGN_OR_RETURN(MachineProfile machine, ParseProfile(spec.parallel.exchange.profile, text));
  ANNULUS_RETURN_IF_ERROR(CheckProfile(machine, spec));
  return machine;
}

LinkThrottle ThrottleOf(const ExchangeSpec& exchange) {
  return {.bytes_per_second = exchange.throttle_gb_per_second * 1e9};
}

// A budget of less than a byte is none, not no budget.
int64_t BufferBytesOf(const ExchangeSpec& exchange) {
  return static_cast<int64_t>(std::ceil(exchange.buffer_gib * static_cast<double>(int64_t{1} << 30)));
}

}  // namespace

std::vector<PlanChoice> ChoicesOf(const PassPlanSpec& spec, int ranks, int64_t heads) {
  std::vector<PlanChoice> choices = BaseChoices(spec, ranks, heads);
  for (PlanChoice& choice : choices) {
    choice.direction = spec.direction;
    if (spec.parts > 0) choice.parts = static_cast<int>(spec.parts);
    choice.buffers = static_cast<int>(spec.buffers);
    choice.output_width = spec.output_width;
  }
  return choices;
}

std::optional<TransportKind> TransportOf(TransportChoice choice) {
  switch (choice) {
    case TransportChoice::kBest:
      return std::nullopt;
    case TransportChoice::kHost:
      return TransportKind::kHost;
    case TransportChoice::kNccl:
      return TransportKind::kNccl;
    case TransportChoice::kCopyEngine:
      return TransportKind::kCopyEngine;
  }
  return std::nullopt;
}

absl::StatusOr<MachineProfile> ProfileOf(const RunSpec& spec) {
  const std::string& path = spec.parallel.exchange.profile;
  if (path.empty()) return AssumedProfile(DeviceKindOf(spec.device));
  ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  return ParseProfileFor(spec, text);
}

absl::StatusOr<MachineProfile> ProfileOf(Communicator world, const RunSpec& spec) {
  const std::string& path = spec.parallel.exchange.profile;
  if (path.empty()) return AssumedProfile(DeviceKindOf(spec.device));
  const absl::StatusOr<std::string> text = world.rank() == 0 ? ReadFile(path) : std::string();
  ANNULUS_RETURN_IF_ERROR(
      world.AgreeOk(Prefixed(text.status(), absl::StrCat("parallel.exchange.profile=", path, ": "))));
  ANNULUS_ASSIGN_OR_RETURN(const std::string agreed, world.BroadcastString(*text, 0));
  absl::StatusOr<MachineProfile> profile = ParseProfileFor(spec, agreed);
  ANNULUS_RETURN_IF_ERROR(world.AgreeOk(profile.status()));
  return profile;
}

std::string ProfileSource(const ExchangeSpec& exchange, const MachineProfile& machine) {
  std::string text = absl::StrCat("assumed: ", machine.device, " (annulus calibrate measures one)");
  if (!exchange.profile.empty()) {
    text =
        absl::StrCat(exchange.profile, ": ", machine.device, ", ", machine.measured ? "measured" : "assumed",
                     " with ", CountText(machine.ranks, "rank"));
    if (machine.products.empty()) absl::StrAppend(&text, "; rates of products assumed");
  }
  const std::string throttled = Label(ThrottleOf(exchange));
  return throttled.empty() ? text : absl::StrCat(text, "; ", throttled);
}

ExchangeOptions ExchangeOptionsOf(const RunSpec& spec, std::vector<TransportKind> available,
                                  MachineProfile machine) {
  const ExchangeSpec& exchange = spec.parallel.exchange;
  const auto ranks = static_cast<int>(spec.parallel.cp);
  ExchangeOptions options;
  const int64_t heads = HeadsToSplit(spec);
  options.forward = ChoicesOf(exchange.Of(Pass::kForward), ranks, heads);
  options.backward = ChoicesOf(exchange.Of(Pass::kBackward), ranks, heads);
  // Left open with AUTO: where links are slow or steps short, it can pay to begin with a part of a block.
  const auto parts = [&](Pass pass) {
    const PassPlanSpec& plan = exchange.Of(pass);
    const bool open = plan.plan == PlanName::kAuto && plan.parts == 0;
    return open ? std::vector<int>{2, 4} : std::vector<int>();
  };
  options.forward_parts = parts(Pass::kForward);
  options.backward_parts = parts(Pass::kBackward);
  options.available = std::move(available);
  options.transport = TransportOf(exchange.transport);
  options.machine = std::move(machine);
  // Of a cp group: its ranks are tp apart.
  int& on_host = options.machine.network.ranks_per_host;
  if (on_host > 0) on_host = std::max(1, on_host / static_cast<int>(spec.parallel.tp));
  options.latents = exchange.latent;
  options.throttle = ThrottleOf(exchange);
  options.buffer_bytes = BufferBytesOf(exchange);
  // So that a kernel that gives up says what it waited for before a watchdog ends the job without. 0: never.
  options.patience_seconds = spec.step_deadline_seconds > 0 ? 0.9 * spec.step_deadline_seconds
                                                            : std::numeric_limits<double>::infinity();
  return options;
}

namespace {

LatentShard LatentShardOf(const RunSpec& spec, const AttentionClass& layers) {
  return annulus::LatentShardOf({.rank = 0, .size = static_cast<int>(spec.parallel.tp)},
                                layers.latent_groups);
}

}  // namespace

AttentionCase AttentionCaseOf(const RunSpec& spec, const AttentionClass& layers, SequenceBatch sequences,
                              bool hopper) {
  AttentionCase layer{.layout = LayoutOf(spec),
                      .sequences = std::move(sequences),
                      .heads = spec.model.heads / spec.parallel.tp,
                      .kv_heads = std::max<int64_t>(1, spec.model.kv_heads / spec.parallel.tp),
                      .head_dim = spec.model.head_dim,
                      .v_head_dim = spec.model.head_dim,
                      .window = layers.window,
                      .device = DeviceKindOf(spec.device),
                      .dtype = DTypeOf(spec.compute),
                      .determinism = spec.deterministic ? Determinism::kRequired : Determinism::kOff,
                      .hopper = hopper,
                      .kernel = spec.attention_kernel};
  if (layers.branch != BranchKind::kLatentAttention) return layer;
  const LatentSpec& latent = spec.model.latent;
  layer.heads = latent.heads / LatentShardOf(spec, layers).head_groups;
  layer.kv_heads = 1;
  layer.head_dim = latent.nope_dim + latent.rope_dim, layer.v_head_dim = latent.v_dim;
  layer.latent = LatentShape{.columns = latent.kv_rank / layers.latent_groups,
                             .nope = latent.nope_dim,
                             .rope = latent.rope_dim,
                             .v = latent.v_dim};
  return layer;
}

int64_t BranchesHere(const RunSpec& spec, const AttentionClass& layers) {
  return layers.latent_groups / LatentShardOf(spec, layers).latent_groups;
}

std::vector<AttentionKind> AttentionKindsOf(const ModelSpec& model) {
  std::map<AttentionClass, std::vector<size_t>> by_class;
  for (size_t i = 0; i < model.layers.size(); ++i) {
    for (const BranchSpec& branch : model.layers[i].branches) {
      if (!MixesTokens(branch.kind) || PassesStates(branch.kind)) continue;
      by_class[{.branch = branch.kind, .window = branch.window, .latent_groups = branch.latent_groups}]
          .push_back(i);
    }
  }
  std::vector<AttentionKind> kinds;
  for (auto& [layers, places] : by_class) kinds.push_back({layers, std::move(places)});
  return kinds;
}

namespace {

// "(2 branches, all keys)"
std::string DetailsText(const AttentionClass& layers) {
  const std::string branches =
      layers.latent_groups > 1 ? absl::StrCat(layers.latent_groups, " branches, ") : "";
  const std::string window = layers.window == 0 ? "all keys" : absl::StrCat("window ", layers.window);
  return absl::StrCat("(", branches, window, ")");
}
const char* NameOf(const AttentionClass& layers) {
  return layers.branch == BranchKind::kLatentAttention ? "latent attention" : "attention";
}
std::string LayerCountText(size_t count, absl::string_view kind) {
  return CountText(static_cast<int64_t>(count), absl::StrCat(kind, " layer"));
}

}  // namespace

std::string LayersText(const AttentionKind& kind) {
  return absl::StrCat(LayerCountText(kind.layers.size(), NameOf(kind.attention)), " ",
                      DetailsText(kind.attention));
}

std::string ClassText(const AttentionClass& layers) {
  return absl::StrCat(NameOf(layers), " ", DetailsText(layers));
}

std::vector<StateKind> StateKindsOf(const RunSpec& spec) {
  std::map<BranchKind, std::vector<size_t>> by_kind;
  for (size_t i = 0; i < spec.model.layers.size(); ++i) {
    for (const BranchSpec& branch : spec.model.layers[i].branches) {
      if (PassesStates(branch.kind)) by_kind[branch.kind].push_back(i);
    }
  }
  std::vector<StateKind> kinds;
  for (auto& [branch, layers] : by_kind) {
    const auto exchange = [&, kind = branch](StateOrder order) {
      return StateExchangeOf(spec.model, kind, order,
                             {.layout = LayoutOf(spec),
                              .sequences = spec.optim.micro_batch,
                              .tp = spec.parallel.tp,
                              .dtype = DTypeOf(spec.compute)});
    };
    kinds.push_back({.branch = branch,
                     .layers = std::move(layers),
                     .forward = exchange(StateOrder::kForward),
                     .backward = exchange(StateOrder::kBackward)});
  }
  return kinds;
}

std::string StateText(const StateKind& kind) {
  const auto both = [](int64_t forward, int64_t backward) {
    const auto text = [](int64_t bytes) { return FormatBytes(static_cast<double>(bytes)); };
    return absl::StrCat(text(forward), " forward, ", text(backward), " backward");
  };
  std::string text =
      absl::StrCat(LayerCountText(kind.layers.size(), Name(kind.branch)), ": a rank sends states of ",
                   both(kind.forward.state_bytes, kind.backward.state_bytes));
  if (kind.forward.halo_bytes > 0) {
    absl::StrAppend(&text, "; rows before a convolution of ",
                    both(kind.forward.halo_bytes, kind.backward.halo_bytes));
  }
  return absl::StrCat(text, "; a layer and micro-batch, whatever the length");
}

const char* Name(Pass pass) { return pass == Pass::kForward ? "forward" : "backward"; }

}  // namespace annulus
