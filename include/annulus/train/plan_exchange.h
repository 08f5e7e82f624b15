#pragma once

// What the attention layers of a run would exchange, without running it: every candidate with its predicted
// time, and one of them as a plan with its timeline.

#include <optional>
#include <string>
#include <vector>

#include "annulus/train/exchange.h"

namespace annulus {

// One pass of an attention layer.
struct PlannedPass {
  AttentionKind kind;  // of a run's layers
  Pass pass = Pass::kForward;
  AttentionCase layer;                    // with latents only where those are exchanged
  std::optional<LatentDecision> latents;  // of latent attention: what is exchanged
  double home_seconds = 0;                // of expanding at home, where keys and values are
  std::vector<PlanCandidate> candidates;  // RankPlans
  size_t shown = 0;                       // of them: what follows
  ExchangePlan plan;
  Simulation simulation;
};

// `shown`: the name of a candidate to look at instead of the fastest, or of a kind ("token_ring"), of which
// the fastest is; empty: the fastest of all. InvalidArgument if no candidate can be, with the reason of each,
// or none of them has that name.
//
// Of latent attention what travels is decided before: candidates are those of it.
absl::StatusOr<PlannedPass> PlanPass(const AttentionCase& layer, Pass pass, const ExchangeOptions& options,
                                     const std::string& shown = "");

// Both passes of every kind of layer of a run.
absl::StatusOr<std::vector<PlannedPass>> PlanExchange(const RunSpec& spec, const SequenceBatch& sequences,
                                                      const ExchangeOptions& options,
                                                      const std::string& shown = "");

// Of the plans shown: what the memory of a rank is planned by.
PlannedExchanges PlannedExchangesOf(const std::vector<PlannedPass>& passes);

// The transports that ranks on one host of the spec's device would have.
std::vector<TransportKind> TransportsOnOneHost(const RunSpec& spec);

// One micro-batch for a plan.
struct ExampleBatch {
  SequenceBatch sequences;
  std::string note;  // what it is, where documents are masked
};
// The first of the run's data where documents are masked and the data are there; else whole sequences.
ExampleBatch ExampleBatchOf(const RunSpec& spec);

// Why the first candidate won; for one rank, that there is nothing to choose.
std::string WhyShown(const PlannedPass& planned);

// The candidates as a table, the shown one marked, and why the first won.
std::string CandidateTable(const PlannedPass& planned);

// Pictures below each other in one.
std::string StackSvg(const std::vector<std::string>& pictures);

}  // namespace annulus
