#pragma once

// Whether a pass of latent attention exchanges latents, which each rank that they come to expands, or keys
// and values, expanded at home: what is predicted to be faster, each by its own fastest plan.

#include "annulus/parallel/choose_plan.h"

namespace annulus {

// Of the same layer, with keys and values in place of latents.
AttentionCase Expanded(AttentionCase layer);

// What the layer's rank takes at home where keys and values are exchanged: the expansion of its latents;
// backward the gradients through it, too.
double HomeExpansionSeconds(const AttentionCase& layer, Pass pass, const MachineProfile& machine);

// The plan of one way; nothing where times are not predicted; an error where no plan can be.
using ChosenPlan = absl::StatusOr<std::optional<PlanCandidate>>;

struct LatentAlternatives {
  LatentExchange asked = LatentExchange::kAuto;
  ChosenPlan latents = std::nullopt, expanded = std::nullopt;
};

struct LatentDecision {
  bool latents = true;  // else keys and values
  // Predicted of either way, where it is; of keys and values with what is done at home.
  std::optional<double> latent_seconds = {}, expanded_seconds = {};
  std::string why = {};  // in one line
};
// One of the ways can be.   layer: with latents
LatentDecision DecideLatents(const AttentionCase& layer, Pass pass, const LatentAlternatives& alternatives,
                             const MachineProfile& machine);

// What travels: "latents", "keys and values".
absl::string_view Name(const LatentDecision& decision);

}  // namespace annulus
