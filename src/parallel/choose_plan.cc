#include "annulus/parallel/choose_plan.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>

#include "absl/strings/str_format.h"
#include "annulus/base/check.h"
#include "plan_cost.h"

namespace annulus {
namespace {

// Of the slots that are not the caller's.
int64_t BufferBytesOf(const AttentionCase& layer, const ExchangePlan& plan) {
  const RowBytes row_bytes(layer, plan);
  int64_t most = 0;
  for (const RankPlan& rank : plan.ranks) {
    int64_t bytes = 0;
    for (const SlotSpec& slot : rank.slots) {
      if (!slot.home) bytes += SlotRows(plan, slot) * row_bytes.Of(slot);
    }
    most = std::max(most, bytes);
  }
  return most;
}

// One choice on each transport.
class Pricing {
 public:
  Pricing(const AttentionCase& layer, Pass pass, const PlanOptions& options, const MachineProfile& machine)
      : layer_(layer), pass_(pass), options_(options), machine_(machine) {}

  void Add(const PlanChoice& choice, std::vector<PlanCandidate>* candidates) {
    PlanCandidate candidate;
    candidate.choice = choice;
    candidate.name = NameOf(choice, layer_.layout.ranks());
    candidate.transport = options_.transports[0];
    absl::StatusOr<ExchangePlan> plan = BuildPlan(ProblemOf(ChunkParts(choice)), pass_, choice);
    if (plan.ok()) {
      candidate.name = plan->name;
      candidate.buffer_bytes = BufferBytesOf(layer_, *plan);
    }
    candidate.refused = plan.ok() ? CheckBuffers(candidate) : plan.status();
    if (!candidate.refused.ok()) return candidates->push_back(candidate);
    const std::vector<std::vector<double>> seconds = ComputeSecondsOf(layer_, *plan, machine_);
    for (const TransportKind transport : options_.transports) {
      candidate.transport = transport;
      const LinkRate* link = FindLink(machine_, transport);
      candidate.refused = absl::OkStatus();
      if (link == nullptr && layer_.layout.ranks() > 1) {
        candidate.refused = Invalid("machine profile of ", machine_.device,
                                    ": expected rates of messages by ", Name(transport));
      } else {
        ExchangeCost cost = MessageCostOf(layer_, *plan, link, options_.throttle);
        cost.compute_seconds = [&](int r, size_t s) { return seconds[static_cast<size_t>(r)][s]; };
        Predict(Simulate(*plan, cost), &candidate);
      }
      candidates->push_back(candidate);
    }
  }

 private:
  const ExchangeProblem& ProblemOf(int parts) {
    const auto known = problems_.find(parts);
    if (known != problems_.end()) return known->second;
    return problems_[parts] = MakeExchangeProblem(layer_.layout, layer_.sequences, layer_.window,
                                                  layer_.heads, layer_.kv_heads, parts);
  }

  absl::Status CheckBuffers(const PlanCandidate& candidate) const {
    if (options_.buffer_bytes == 0 || candidate.buffer_bytes <= options_.buffer_bytes)
      return absl::OkStatus();
    constexpr double kMiB = 1 << 20;
    return absl::ResourceExhaustedError(
        absl::StrFormat("%s: buffers of %.1f MiB on a rank: expected at most %.1f MiB", candidate.name,
                        static_cast<double>(candidate.buffer_bytes) / kMiB,
                        static_cast<double>(options_.buffer_bytes) / kMiB));
  }

  static void Predict(const Simulation& run, PlanCandidate* candidate) {
    candidate->seconds = run.makespan;
    std::vector<double> ends;
    for (size_t r = 0; r < run.compute.size(); ++r) ends.push_back(run.compute[r] + run.exposed[r]);
    const auto slowest = std::max_element(ends.begin(), ends.end()) - ends.begin();
    candidate->exposed_seconds = run.exposed[static_cast<size_t>(slowest)];
    candidate->bytes_sent = *std::max_element(run.bytes_sent.begin(), run.bytes_sent.end());
  }

  const AttentionCase& layer_;
  const Pass pass_;
  const PlanOptions& options_;
  const MachineProfile& machine_;
  std::map<int, ExchangeProblem> problems_;  // by parts
};

bool SameKind(const PlanCandidate& a, const PlanCandidate& b) {
  return a.choice.kind == b.choice.kind && a.choice.head_split == b.choice.head_split;
}

// Predictions are not that exact: of what is as fast the plan that needs less wins.
double TimePlace(const PlanCandidate& candidate) {
  constexpr double kSteps = 1e4;
  return candidate.seconds > 0 ? std::round(std::log(candidate.seconds) * kSteps) : -1e9;
}

std::string Milliseconds(double seconds) { return absl::StrFormat("%.3g ms", seconds * 1e3); }

std::string Described(const PlanCandidate& candidate) {
  return absl::StrCat(candidate.name, " by ", Name(candidate.transport), " ", Milliseconds(candidate.seconds),
                      ", ", Milliseconds(candidate.exposed_seconds), " exposed");
}

}  // namespace

std::vector<PlanCandidate> RankPlans(const AttentionCase& layer, Pass pass, const PlanOptions& options,
                                     const MachineProfile& machine) {
  ANNULUS_CHECK(!options.transports.empty()) << "no transport to choose from";
  Pricing pricing(layer, pass, options, machine);
  const std::vector<PlanChoice> plans =
      options.plans.empty() ? AllChoices(layer.layout.ranks(), layer.heads) : options.plans;
  std::vector<PlanCandidate> candidates;
  for (const PlanChoice& choice : plans) pricing.Add(choice, &candidates);
  const auto place = [](const PlanCandidate& c) {
    return c.refused.ok() ? std::tuple(0, TimePlace(c), c.buffer_bytes, c.bytes_sent)
                          : std::tuple(1, 0.0, int64_t{0}, int64_t{0});
  };
  std::stable_sort(candidates.begin(), candidates.end(),
                   [&](const PlanCandidate& a, const PlanCandidate& b) { return place(a) < place(b); });
  return candidates;
}

std::string WhyItWon(const std::vector<PlanCandidate>& ranked) {
  if (ranked.empty() || !ranked[0].refused.ok()) return "no plan can be";
  const PlanCandidate& won = ranked[0];
  const auto other = std::find_if(ranked.begin(), ranked.end(), [&](const PlanCandidate& candidate) {
    return candidate.refused.ok() && !SameKind(candidate, won);
  });
  if (other == ranked.end()) return absl::StrCat(Described(won), ": no other kind can be");
  const double exposed = other->exposed_seconds - won.exposed_seconds;
  const double computed = other->seconds - won.seconds - exposed;
  std::string reason = absl::StrCat("which computes ", Milliseconds(computed), " longer");
  if (exposed > computed) reason = absl::StrCat("which exposes ", Milliseconds(exposed), " more");
  if (TimePlace(*other) == TimePlace(won)) {
    reason = other->buffer_bytes > won.buffer_bytes ? "which needs more memory" : "which sends more";
  }
  return absl::StrCat(Described(won), "; next ", Described(*other), ", ", reason);
}

}  // namespace annulus
