#include "annulus/parallel/choose_latents.h"

#include "absl/strings/str_format.h"
#include "plan_cost.h"
#include "slot_fields.h"

namespace annulus {
namespace {

// "latents 3.2 ms, 576 elements a token"
std::string Described(const AttentionCase& layer, const char* what, const absl::Status& status,
                      const std::optional<double>& seconds) {
  std::string text = what;
  if (seconds.has_value()) absl::StrAppendFormat(&text, " %.3g ms", *seconds * 1e3);
  if (!status.ok()) return absl::StrCat(text, " cannot be (", std::string(status.message()), ")");
  return absl::StrCat(text, ", ", layer.kv_heads * KvColumns(layer), " elements a token");
}

}  // namespace

AttentionCase Expanded(AttentionCase layer) {
  layer.kv_heads = layer.heads;
  layer.latent.reset();
  return layer;
}

double HomeExpansionSeconds(const AttentionCase& layer, Pass pass, const MachineProfile& machine) {
  const Expansion expansion{
      .rows = layer.layout.local_rows(), .heads = layer.heads, .gradients = layer.dtype};
  return ExpansionSeconds(layer, pass, expansion, machine);
}

LatentDecision DecideLatents(const AttentionCase& layer, Pass pass, const LatentAlternatives& alternatives,
                             const MachineProfile& machine) {
  const ChosenPlan &latents = alternatives.latents, &expanded = alternatives.expanded;
  LatentDecision decision;
  if (latents.ok() && latents->has_value()) decision.latent_seconds = (*latents)->seconds;
  if (expanded.ok() && expanded->has_value()) {
    decision.expanded_seconds = (*expanded)->seconds + HomeExpansionSeconds(layer, pass, machine);
  }
  decision.latents = latents.ok();
  if (expanded.ok() && decision.latent_seconds && decision.expanded_seconds) {
    decision.latents = *decision.latent_seconds <= *decision.expanded_seconds;
  }
  const bool asked = alternatives.asked != LatentExchange::kAuto;
  if (asked) decision.latents = alternatives.asked == LatentExchange::kLatent;
  const std::string ways[] = {
      Described(layer, "latents", latents.status(), decision.latent_seconds),
      Described(Expanded(layer), "keys and values", expanded.status(), decision.expanded_seconds)};
  const size_t taken = decision.latents ? 0 : 1;
  decision.why =
      absl::StrCat(ways[taken], asked ? ", as parallel.exchange.latent says; " : "; ", ways[1 - taken]);
  return decision;
}

absl::string_view Name(const LatentDecision& decision) {
  return decision.latents ? "latents" : "keys and values";
}

}  // namespace annulus
