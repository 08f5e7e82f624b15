#include "fit_bound.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "annulus/parallel/plan_bound.h"
#include "annulus/study/simulate_step.h"
#include "annulus/train/exchange.h"
#include "annulus/train/trainer.h"
#include "simulate_step_cluster.h"
#include "step_cost_exchange.h"

namespace annulus {
namespace {

// Blocks of keys that are all seen may be computed on faster than a whole sequence, part of which is masked.
constexpr double kFasterInBlocks = 0.9;

// Of a rank without a cp group, on sequences of this length.
absl::StatusOr<StepCost> CostAlone(RunSpec spec, int64_t seq_len, const MachineProfile& machine) {
  spec.parallel.dp *= spec.parallel.cp;  // as many shards
  spec.optim.sequences_per_step *= spec.parallel.cp;
  spec.parallel.cp = 1;
  spec.parallel.exchange.both = {};
  spec.parallel.exchange.forward = spec.parallel.exchange.backward = std::nullopt;
  spec.data.seq_len = std::max<int64_t>(1, seq_len);
  return CostOfStep(spec, machine, PlanEffort::kQuick);
}

// Bytes that may come to a host in a second, and of them to one rank.
struct HostRates {
  double host = 0, rank = 0;
};
HostRates RatesBetweenHosts(const MachineProfile& machine) {
  const double unlimited = std::numeric_limits<double>::infinity();
  const auto or_unlimited = [&](double rate) { return rate > 0 ? rate : unlimited; };
  const double rank = or_unlimited(BestRate(machine.network.links, machine.network.collectives));
  const double host = or_unlimited(machine.network.host_bytes_per_second);
  return {.host = std::min(host, rank * std::max(1, machine.network.ranks_per_host)),
          .rank = std::min(host, rank)};
}

// Of the plans that the layers choose from, that which could be the fastest.
double LeastOfPlans(const RunSpec& spec, const AttentionCase& layer, Pass pass,
                    const ExchangeOptions& options, double host_rate) {
  double least = std::numeric_limits<double>::infinity();
  const PlanOptions plans = PlanOptionsOf(options, pass);
  for (const PlanChoice& choice : plans.plans) {
    for (const TransportKind transport : plans.transports) {
      const PlanBound bound = BoundOfChoice(layer, pass, choice, transport, options.machine);
      // The tp groups of a host send side by side.
      const double sends = static_cast<double>(spec.parallel.tp) * bound.host_bytes / host_rate;
      least = std::min(least, std::max(bound.seconds, sends));
    }
  }
  return least;
}

// Whose exchanges take so long and have no peers.
void SetExchanges(const std::vector<double>& seconds, StepCost* cost) {
  for (size_t i = 0; i < seconds.size(); ++i)
    cost->exchanges[i].seconds = {seconds[i]}, cost->exchanges[i].exposed = {0}, cost->exchanges[i].sent = {};
}

double SecondsAlone(RunSpec spec, const MachineProfile& machine, const StepCost& cost) {
  spec.parallel.dp = spec.parallel.cp = 1;
  return SimulateStep(spec, machine, cost).step_seconds;
}

}  // namespace

absl::StatusOr<double> LeastSeconds(const RunSpec& spec, const MachineProfile& machine,
                                    const LeastExchanges& known) {
  const int64_t cp = spec.parallel.cp;
  ANNULUS_ASSIGN_OR_RETURN(const StepCost whole, CostAlone(spec, spec.data.seq_len, machine));
  if (cp == 1) return LeastSeconds(spec, machine, whole);
  // All but attention is computed as by one alone on sequences as long as its part is.
  ANNULUS_ASSIGN_OR_RETURN(StepCost part, CostAlone(spec, spec.data.seq_len / cp, machine));
  const ExchangeOptions options = ExchangeOptionsFor(spec, machine, EffortFor(cp));
  const double host_rate = RatesBetweenHosts(machine).host;
  std::vector<double> seconds;
  for (const AttentionKind& kind : AttentionKindsOf(spec.model)) {
    const AttentionCase layer =
        AttentionCaseOf(spec, kind.attention, WholeSequences(spec), RunsHopperKernels(machine));
    for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
      const double share = kFasterInBlocks * whole.exchanges[seconds.size()].seconds[0];
      const double of_plans = LeastOfPlans(spec, layer, pass, options, host_rate);
      seconds.push_back(std::max(share / static_cast<double>(cp), of_plans));
    }
  }
  for (size_t i = 0; i < known.size(); ++i) seconds[i] = std::max(seconds[i], known[i]);
  SetExchanges(seconds, &part);
  return SecondsAlone(spec, machine, part);
}

double LeastSeconds(const RunSpec& spec, const MachineProfile& machine, StepCost cost) {
  const double per_second = RatesBetweenHosts(machine).rank;
  const int tp = static_cast<int>(spec.parallel.tp), on_host = machine.network.ranks_per_host;
  const auto ranks = static_cast<size_t>(spec.parallel.cp);
  std::vector<std::vector<double>> by_rank(ranks);
  for (const ExchangePass& pass : cost.exchanges) {
    std::vector<double> sent(ranks), got(ranks);
    for (const ExchangePass::Sent& each : pass.sent) {
      // Of the first replica; the others stand on hosts in the same way, or better for some.
      if (on_host == 0 || each.from * tp / on_host == each.to * tp / on_host) continue;
      sent[static_cast<size_t>(each.from)] += static_cast<double>(each.bytes);
      got[static_cast<size_t>(each.to)] += static_cast<double>(each.bytes);
    }
    for (size_t r = 0; r < ranks; ++r)
      by_rank[r].push_back(std::max(pass.seconds[r], std::max(sent[r], got[r]) / per_second));
  }
  const auto longest = std::max_element(by_rank.begin(), by_rank.end(), [](const auto& a, const auto& b) {
    return std::accumulate(a.begin(), a.end(), 0.0) < std::accumulate(b.begin(), b.end(), 0.0);
  });
  SetExchanges(*longest, &cost);
  return SecondsAlone(spec, machine, cost);
}

LeastExchanges ExchangesAtLeast(const std::vector<ExchangePass>& exchanges, int64_t micro_batch,
                                int64_t other_micro_batch) {
  // The calmest of plans that are about as fast was chosen, and its ranks do not all end at once.
  constexpr double kFastest = 0.97;
  const double share =
      std::min(1.0, static_cast<double>(other_micro_batch) / static_cast<double>(micro_batch));
  LeastExchanges least;
  for (const ExchangePass& pass : exchanges)
    least.push_back(kFastest * share * *std::min_element(pass.seconds.begin(), pass.seconds.end()));
  return least;
}

int64_t LeastBytes(const RunSpec& spec, const MachineProfile& machine) {
  int64_t least = 0;
  for (const bool at_home : {false, true}) {
    PlannedExchanges none;
    for (const AttentionKind& kind : AttentionKindsOf(spec.model))
      none[kind.attention] = {.buffer_bytes = 0, .expanded_at_home = at_home};
    const int64_t bytes = PlanMemory(spec, none).total() + machine.other_memory_bytes;
    least = at_home ? std::min(least, bytes) : bytes;
  }
  return least;
}

}  // namespace annulus
