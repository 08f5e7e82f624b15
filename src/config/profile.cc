#include "annulus/train/profile.h"

#include "machine.pb.h"
#include "parse.h"
#include "print.h"
#include "provenance.h"
#include "section.h"

namespace annulus {
namespace {

using config::Presence;
using config::Section;

constexpr IntRange kMultiprocessors{0, 1 << 20};
constexpr IntRange kComputeCapability{0, 1000};
constexpr IntRange kBytes{0, int64_t{1} << 50};
constexpr RealRange kSize{0.0, 1e30, RealRange::Bound::kOpen};
constexpr RealRange kPerSecond{0.0, 1e30, RealRange::Bound::kOpen};
constexpr RealRange kSeconds{0.0, 1e6};
constexpr RealRange kSlowdown{1.0, 1e6};
constexpr RealRange kAtLeastZero{0.0, 1e30};
constexpr size_t kLongestText = size_t{1} << 24;

template <typename T>
using Names = std::vector<std::pair<std::string, T>>;

const Names<AttentionKernel>& Kernels() {
  static const auto& names = *new Names<AttentionKernel>{{"CPU_TILES", AttentionKernel::kCpuTiles},
                                                         {"CUDA_F32", AttentionKernel::kF32},
                                                         {"CUDA_MMA", AttentionKernel::kTensorCore},
                                                         {"CUDNN", AttentionKernel::kCudnn},
                                                         {"HOPPER", AttentionKernel::kHopper}};
  return names;
}
const Names<Pass>& Passes() {
  static const auto& names = *new Names<Pass>{{"FORWARD", Pass::kForward}, {"BACKWARD", Pass::kBackward}};
  return names;
}
const Names<MaskShape>& Shapes() {
  static const auto& names = *new Names<MaskShape>{
      {"GENERAL", MaskShape::kGeneral}, {"FULL", MaskShape::kFull}, {"CAUSAL", MaskShape::kCausal}};
  return names;
}
const Names<TransportKind>& Transports() {
  static const auto& names = *new Names<TransportKind>{{"HOST", TransportKind::kHost},
                                                       {"NCCL", TransportKind::kNccl},
                                                       {"COPY_ENGINE", TransportKind::kCopyEngine}};
  return names;
}
const Names<ScanKernel>& Scans() {
  static const auto& names =
      *new Names<ScanKernel>{{"SSD", ScanKernel::kSsd}, {"DELTA_RULE", ScanKernel::kDeltaRule}};
  return names;
}
const Names<PassKind>& PassKinds() {
  static const auto& names = *new Names<PassKind>{{"MOVE", PassKind::kMove},
                                                  {"NORM", PassKind::kNorm},
                                                  {"ACTIVATION", PassKind::kActivation},
                                                  {"ROPE", PassKind::kRope},
                                                  {"CONVOLUTION", PassKind::kConvolution},
                                                  {"GATED_NORM", PassKind::kGatedNorm},
                                                  {"CROSS_ENTROPY", PassKind::kCrossEntropy},
                                                  {"ADAMW", PassKind::kAdamW}};
  return names;
}

// In ascending order of size; where they are required, at least one.
std::vector<RatePoint> BindPoints(const Section& section, const std::string& name,
                                  Presence presence = Presence::kRequired) {
  std::vector<RatePoint> points;
  for (const Section& child : section.Children(name)) {
    RatePoint point;
    child.Real("size", Presence::kRequired, kSize, &point.size);
    child.Real("per_second", Presence::kRequired, kPerSecond, &point.per_second);
    if (!points.empty() && point.size <= points.back().size) {
      child.provenance()->Refuse(
          child.PathOf("size"), absl::StrCat(point.size),
          absl::StrCat("expected more than ", points.back().size, ", the size of the point before"));
    }
    points.push_back(point);
  }
  if (points.empty() && presence == Presence::kRequired) {
    section.provenance()->Missing(section.PathOf(name),
                                  absl::StrCat("at least one ", name, " { size: ... per_second: ... }"));
  }
  return points;
}

AttentionRate BindAttention(const Section& section) {
  AttentionRate rate;
  section.Enum("kernel", Kernels(), &rate.kernel, Presence::kRequired);
  section.Enum("pass", Passes(), &rate.pass, Presence::kRequired);
  section.Enum("shape", Shapes(), &rate.shape, Presence::kRequired);
  section.Int("head_dim", Presence::kRequired, kHeadDimRange, &rate.head_dim);
  section.Int("v_head_dim", Presence::kRequired, kHeadDimRange, &rate.v_head_dim);
  bool ordered = false;
  section.Bool("ordered", &ordered);
  if (ordered) rate.determinism = Determinism::kRequired;
  rate.pairs = BindPoints(section, "pairs");
  return rate;
}

LinkRate BindLink(const Section& section) {
  LinkRate rate;
  section.Enum("transport", Transports(), &rate.transport, Presence::kRequired);
  rate.one_way = BindPoints(section, "one_way");
  rate.both_ways = BindPoints(section, "both_ways");
  section.Real("message_seconds", Presence::kRequired, kSeconds, &rate.message_seconds);
  section.Real("computing_slowdown", Presence::kOptional, kSlowdown, &rate.computing_slowdown);
  return rate;
}

ScanRate BindScan(const Section& section) {
  ScanRate rate;
  section.Enum("kernel", Scans(), &rate.kernel, Presence::kRequired);
  section.Enum("pass", Passes(), &rate.pass, Presence::kRequired);
  rate.updates = BindPoints(section, "updates");
  return rate;
}

PassRate BindPass(const Section& section) {
  PassRate rate;
  section.Enum("kind", PassKinds(), &rate.kind, Presence::kRequired);
  section.Enum("pass", Passes(), &rate.pass, Presence::kRequired);
  rate.bytes = BindPoints(section, "bytes");
  return rate;
}

NetworkProfile BindNetwork(const Section& section) {
  NetworkProfile network;
  int64_t ranks = 0;
  section.Int("ranks_per_host", Presence::kRequired, kRanksRange, &ranks);
  network.ranks_per_host = static_cast<int>(ranks);
  for (const Section& link : section.Children("link")) network.links.push_back(BindLink(link));
  section.Real("host_bytes_per_second", Presence::kOptional, kAtLeastZero, &network.host_bytes_per_second);
  network.collectives = BindPoints(section, "collective", Presence::kOptional);
  section.Real("collective_slowdown", Presence::kOptional, kSlowdown, &network.collective_slowdown);
  section.Real("collective_step_seconds", Presence::kOptional, kSeconds, &network.collective_step_seconds);
  return network;
}

ReliabilityProfile BindReliability(const Section& section) {
  ReliabilityProfile reliability;
  section.Real("failure_hours", Presence::kOptional, kAtLeastZero, &reliability.failure_hours);
  section.Real("restart_seconds", Presence::kOptional, kAtLeastZero, &reliability.restart_seconds);
  section.Real("storage_bytes_per_second", Presence::kOptional, kAtLeastZero,
               &reliability.storage_bytes_per_second);
  return reliability;
}

// What a file may leave out.
enum class Assumed { kNothing, kHopper, kCpuCore };
const Names<Assumed>& AssumedNames() {
  static const auto& names = *new Names<Assumed>{
      {"NOTHING", Assumed::kNothing}, {"HOPPER", Assumed::kHopper}, {"CPU_CORE", Assumed::kCpuCore}};
  return names;
}
MachineProfile ProfileLike(Assumed assumed) {
  switch (assumed) {
    case Assumed::kHopper:
      return AssumedHopper();
    case Assumed::kCpuCore:
      return AssumedCpuCore();
    case Assumed::kNothing:
      break;
  }
  return {};
}

// Lists replace those of the profile as a whole.
void SetPoints(const Section& root, const std::string& name, Presence presence,
               std::vector<RatePoint>* points) {
  std::vector<RatePoint> given = BindPoints(root, name, presence);
  if (!given.empty()) *points = std::move(given);
}
template <typename T>
void SetAll(const Section& root, const std::string& name, T (*bind)(const Section&), std::vector<T>* all) {
  const std::vector<Section> children = root.Children(name);
  if (!children.empty()) all->clear();
  for (const Section& child : children) all->push_back(bind(child));
}

void BindRates(const Section& root, Presence presence, MachineProfile* profile) {
  root.Real("launch_seconds", presence, kSeconds, &profile->launch_seconds);
  SetPoints(root, "copy", presence, &profile->copy);
  SetPoints(root, "product", Presence::kOptional, &profile->products);
  SetPoints(root, "product_gradients", Presence::kOptional, &profile->product_gradients);
  SetPoints(root, "collective", Presence::kOptional, &profile->collectives);
  root.Real("collective_slowdown", Presence::kOptional, kSlowdown, &profile->collective_slowdown);
  root.Real("collective_step_seconds", Presence::kOptional, kSeconds, &profile->collective_step_seconds);
  SetAll(root, "scan", BindScan, &profile->scans);
  SetAll(root, "pass", BindPass, &profile->passes);
  SetAll(root, "link", BindLink, &profile->links);
  SetAll(root, "attention", BindAttention, &profile->attention);
  if (profile->attention.empty()) {
    root.provenance()->Missing("attention", "at least one attention { ... }, or nothing can be predicted");
  }
}

MachineProfile Bind(const Section& root) {
  Assumed like = Assumed::kNothing;
  root.Enum("like", AssumedNames(), &like);
  MachineProfile profile = ProfileLike(like);
  const Presence presence = like == Assumed::kNothing ? Presence::kRequired : Presence::kOptional;
  int64_t ranks = profile.ranks, multiprocessors = profile.multiprocessors,
          compute_capability = profile.compute_capability;
  root.String("device", Presence::kRequired, &profile.device);
  root.Bool("measured", &profile.measured);
  root.Int("ranks", presence, kRanksRange, &ranks);
  profile.ranks = static_cast<int>(ranks);
  root.Int("multiprocessors", Presence::kOptional, kMultiprocessors, &multiprocessors);
  profile.multiprocessors = static_cast<int>(multiprocessors);
  root.Int("compute_capability", Presence::kOptional, kComputeCapability, &compute_capability);
  profile.compute_capability = static_cast<int>(compute_capability);
  root.Real("peak_tflops", Presence::kOptional, kAtLeastZero, &profile.peak_tflops);
  root.Int("memory_bytes", Presence::kOptional, kBytes, &profile.memory_bytes);
  root.Int("other_memory_bytes", Presence::kOptional, kBytes, &profile.other_memory_bytes);
  BindRates(root, presence, &profile);
  if (root.Has("network")) profile.network = BindNetwork(root.Child("network"));
  if (root.Has("reliability")) profile.reliability = BindReliability(root.Child("reliability"));
  return profile;
}

template <typename T>
int NumberOf(const Names<T>& names, const google::protobuf::EnumDescriptor* type, T value) {
  for (const auto& [label, meaning] : names) {
    if (meaning == value) return type->FindValueByName(label)->number();
  }
  return 0;
}

template <typename Points>
void WritePoints(const std::vector<RatePoint>& points, Points* out) {
  for (const RatePoint& point : points) {
    config::RatePoint* to = out->Add();
    to->set_size(point.size);
    to->set_per_second(point.per_second);
  }
}

void WriteAttention(const AttentionRate& rate, config::AttentionRate* out) {
  using To = config::AttentionRate;
  out->set_kernel(static_cast<To::Kernel>(NumberOf(Kernels(), To::Kernel_descriptor(), rate.kernel)));
  out->set_pass(static_cast<To::Pass>(NumberOf(Passes(), To::Pass_descriptor(), rate.pass)));
  out->set_shape(static_cast<To::Shape>(NumberOf(Shapes(), To::Shape_descriptor(), rate.shape)));
  out->set_head_dim(rate.head_dim);
  out->set_v_head_dim(rate.v_head_dim);
  if (rate.determinism == Determinism::kRequired) out->set_ordered(true);
  WritePoints(rate.pairs, out->mutable_pairs());
}

void WriteLink(const LinkRate& rate, config::LinkRate* out) {
  using To = config::LinkRate;
  out->set_transport(
      static_cast<To::Transport>(NumberOf(Transports(), To::Transport_descriptor(), rate.transport)));
  WritePoints(rate.one_way, out->mutable_one_way());
  WritePoints(rate.both_ways, out->mutable_both_ways());
  out->set_message_seconds(rate.message_seconds);
  out->set_computing_slowdown(rate.computing_slowdown);
}

config::Direction DirectionOf(Pass pass) {
  return static_cast<config::Direction>(NumberOf(Passes(), config::Direction_descriptor(), pass));
}

void WriteScan(const ScanRate& rate, config::ScanRate* out) {
  using To = config::ScanRate;
  out->set_kernel(static_cast<To::Kernel>(NumberOf(Scans(), To::Kernel_descriptor(), rate.kernel)));
  out->set_pass(DirectionOf(rate.pass));
  WritePoints(rate.updates, out->mutable_updates());
}

void WritePass(const PassRate& rate, config::PassRate* out) {
  using To = config::PassRate;
  out->set_kind(static_cast<To::Kind>(NumberOf(PassKinds(), To::Kind_descriptor(), rate.kind)));
  out->set_pass(DirectionOf(rate.pass));
  WritePoints(rate.bytes, out->mutable_bytes());
}

// Fields that are not known are left out.
void WriteMachine(const MachineProfile& profile, config::MachineProfile* out) {
  if (profile.collective_step_seconds != MachineProfile().collective_step_seconds)
    out->set_collective_step_seconds(profile.collective_step_seconds);
  if (profile.peak_tflops > 0) out->set_peak_tflops(profile.peak_tflops);
  if (profile.memory_bytes > 0) out->set_memory_bytes(profile.memory_bytes);
  if (profile.other_memory_bytes > 0) out->set_other_memory_bytes(profile.other_memory_bytes);
  if (profile.network != NetworkProfile()) {
    config::Network* network = out->mutable_network();
    network->set_ranks_per_host(profile.network.ranks_per_host);
    for (const LinkRate& link : profile.network.links) WriteLink(link, network->add_link());
    network->set_host_bytes_per_second(profile.network.host_bytes_per_second);
    WritePoints(profile.network.collectives, network->mutable_collective());
    network->set_collective_slowdown(profile.network.collective_slowdown);
    if (profile.network.collective_step_seconds != NetworkProfile().collective_step_seconds)
      network->set_collective_step_seconds(profile.network.collective_step_seconds);
  }
  if (profile.reliability != ReliabilityProfile()) {
    config::Reliability* reliability = out->mutable_reliability();
    reliability->set_failure_hours(profile.reliability.failure_hours);
    reliability->set_restart_seconds(profile.reliability.restart_seconds);
    reliability->set_storage_bytes_per_second(profile.reliability.storage_bytes_per_second);
  }
}

}  // namespace

absl::StatusOr<MachineProfile> ParseProfile(const std::string& name, const std::string& text) {
  if (text.size() > kLongestText) {
    return Invalid(config::Printable(name), ": ", text.size(), " bytes; expected at most ", kLongestText);
  }
  config::MachineProfile message;
  config::Provenance provenance(name, config::MachineProfile::descriptor());
  for (const config::SyntaxError& error : config::ParseMessage(text, "", &message, provenance.tree())) {
    provenance.ErrorAt(error.line, error.column, error.message);
  }
  ANNULUS_RETURN_IF_ERROR(provenance.status());
  MachineProfile profile = Bind(Section(&message, "", &provenance));
  ANNULUS_RETURN_IF_ERROR(provenance.status());
  return profile;
}

std::string ProfileText(const MachineProfile& profile) {
  config::MachineProfile message;
  message.set_device(profile.device);
  message.set_measured(profile.measured);
  message.set_ranks(profile.ranks);
  if (profile.multiprocessors > 0) message.set_multiprocessors(profile.multiprocessors);
  if (profile.compute_capability > 0) message.set_compute_capability(profile.compute_capability);
  message.set_launch_seconds(profile.launch_seconds);
  WritePoints(profile.copy, message.mutable_copy());
  WritePoints(profile.products, message.mutable_product());
  WritePoints(profile.product_gradients, message.mutable_product_gradients());
  for (const ScanRate& rate : profile.scans) WriteScan(rate, message.add_scan());
  for (const PassRate& rate : profile.passes) WritePass(rate, message.add_pass());
  WritePoints(profile.collectives, message.mutable_collective());
  message.set_collective_slowdown(profile.collective_slowdown);
  WriteMachine(profile, &message);
  for (const LinkRate& link : profile.links) WriteLink(link, message.add_link());
  for (const AttentionRate& rate : profile.attention) WriteAttention(rate, message.add_attention());
  return absl::StrCat(profile.measured ? "# Measured by annulus calibrate.\n" : "# Assumed, not measured.\n",
                      config::PrintCompact(message));
}

}  // namespace annulus
