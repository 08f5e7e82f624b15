#include "bind_exchange.h"

namespace annulus {
namespace {

constexpr std::pair<const char*, PlanName> kPlanNames[] = {
    {"AUTO", PlanName::kAuto},
    {"ALL_GATHER", PlanName::kAllGather},
    {"KV_RING", PlanName::kKvRing},
    {"BIDIRECTIONAL_KV_RING", PlanName::kBidirectionalKvRing},
    {"DIRECT_CAST", PlanName::kDirectCast},
    {"TOKEN_RING", PlanName::kTokenRing},
    {"BIDIRECTIONAL_TOKEN_RING", PlanName::kBidirectionalTokenRing},
    {"BALANCED", PlanName::kBalanced},
    {"DOUBLE_RING", PlanName::kDoubleRing},
    {"MESH", PlanName::kMesh},
    {"ARENA", PlanName::kArena},
    {"ULYSSES", PlanName::kUlysses}};

}  // namespace

const char* Name(PlanName name) {
  for (const auto& [label, plan] : kPlanNames) {
    if (plan == name) return label;
  }
  return "";
}

namespace config {
namespace {

constexpr IntRange kSplit{0, int64_t{1} << 20};
constexpr IntRange kParts{0, 64};
constexpr IntRange kBuffers{2, 64};
constexpr RealRange kRate{0.0, 1e6};
constexpr RealRange kGib{0.0, 1e6};

// What `section` leaves away stays as it is in `out`.
void BindPassPlan(const Section& section, PassPlanSpec* out) {
  section.Enum<PlanName>("plan", {std::begin(kPlanNames), std::end(kPlanNames)}, &out->plan);
  section.Enum<RingDirection>("direction",
                              {{"FEWEST_ROWS", RingDirection::kFewestRows},
                               {"TOWARD_LOWER", RingDirection::kTowardLower},
                               {"TOWARD_HIGHER", RingDirection::kTowardHigher}},
                              &out->direction);
  section.Int("head_split", Presence::kOptional, kSplit, &out->head_split);
  section.Int("inner", Presence::kOptional, kSplit, &out->inner);
  section.Int("parts", Presence::kOptional, kParts, &out->parts);
  section.Int("buffers", Presence::kOptional, kBuffers, &out->buffers);
  section.Enum<Width>("output_width", {{"ACCUMULATOR", Width::kAccumulator}, {"COMPUTE", Width::kCompute}},
                      &out->output_width);
}

void BindOwnPlan(const Section& exchange, const std::string& pass, const PassPlanSpec& both,
                 std::optional<PassPlanSpec>* out) {
  if (!exchange.Has(pass)) return;
  *out = both;
  BindPassPlan(exchange.Child(pass), &**out);
}

}  // namespace

void BindExchange(const Section& exchange, ExchangeSpec* out) {
  BindPassPlan(exchange, &out->both);
  BindOwnPlan(exchange, "forward", out->both, &out->forward);
  BindOwnPlan(exchange, "backward", out->both, &out->backward);
  exchange.Enum<TransportChoice>("transport",
                                 {{"BEST", TransportChoice::kBest},
                                  {"HOST", TransportChoice::kHost},
                                  {"NCCL", TransportChoice::kNccl},
                                  {"COPY_ENGINE", TransportChoice::kCopyEngine}},
                                 &out->transport);
  exchange.Enum<LatentExchange>("latent",
                                {{"AUTO", LatentExchange::kAuto},
                                 {"LATENT", LatentExchange::kLatent},
                                 {"EXPANDED", LatentExchange::kExpanded}},
                                &out->latent);
  exchange.Real("throttle_gb_per_second", Presence::kOptional, kRate, &out->throttle_gb_per_second);
  exchange.Real("buffer_gib", Presence::kOptional, kGib, &out->buffer_gib);
  if (exchange.Has("profile")) {
    exchange.Path("profile", Presence::kRequired, &out->profile);
  } else {
    exchange.provenance()->MarkUnset(exchange.PathOf("profile"), "profile: assumed, by the device");
  }
}

}  // namespace config
}  // namespace annulus
