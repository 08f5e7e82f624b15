#include "annulus/parallel/choose_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <tuple>

#include "absl/strings/str_format.h"
#include "annulus/base/check.h"
#include "annulus/base/threads.h"
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

// "112.0 MiB"; "9 bytes"
std::string BytesText(int64_t bytes) {
  constexpr int64_t kKiB = 1 << 10, kMiB = 1 << 20;
  if (bytes < kKiB) return absl::StrCat(bytes, " bytes");
  const double count = static_cast<double>(bytes);
  return bytes < kMiB ? absl::StrFormat("%.1f KiB", count / kKiB) : absl::StrFormat("%.1f MiB", count / kMiB);
}

// What a plan takes at least.
struct Bound {
  double seconds = 0;      // computing of a rank, or its bytes through what is narrowest
  int64_t bytes_sent = 0;  // of the rank that sends most
};
Bound BoundOf(const ExchangePlan& plan, const std::vector<std::vector<double>>& compute_seconds,
              const ExchangeCost& cost) {
  const size_t ranks = plan.ranks.size();
  std::vector<double> in(ranks);
  Bound bound;
  for (size_t r = 0; r < ranks; ++r) {
    const RankPlan& rank = plan.ranks[r];
    double out = 0;
    std::vector<double> to(ranks);
    for (const Step& step : rank.steps) {
      if (step.kind != StepKind::kSend) continue;
      const double bytes = static_cast<double>(step.rows.rows.size()) *
                           cost.row_bytes(rank.slots[static_cast<size_t>(step.slot)]);
      const auto peer = static_cast<size_t>(step.peer);
      out += bytes, to[peer] += bytes, in[peer] += bytes;
    }
    const auto& seconds = compute_seconds[r];
    bound.seconds = std::max(bound.seconds, std::accumulate(seconds.begin(), seconds.end(), 0.0));
    bound.bytes_sent = std::max(bound.bytes_sent, static_cast<int64_t>(out));
    bound.seconds = std::max(bound.seconds, out / cost.egress_bytes_per_second);
    for (size_t peer = 0; peer < ranks; ++peer) {
      if (to[peer] == 0) continue;
      const double rate = cost.link_bytes_per_second(static_cast<int>(r), static_cast<int>(peer));
      bound.seconds = std::max(bound.seconds, to[peer] / rate);
    }
  }
  for (const double bytes : in)
    bound.seconds = std::max(bound.seconds, bytes / cost.ingress_bytes_per_second);
  return bound;
}

// Whether no message by `a` takes longer than by `b`, so that no plan does.
bool NoSlower(const ExchangeCost& a, const ExchangeCost& b, int ranks) {
  return a.egress_bytes_per_second >= b.egress_bytes_per_second &&
         a.ingress_bytes_per_second >= b.ingress_bytes_per_second &&
         a.link_bytes_per_second(0, 1) >= b.link_bytes_per_second(0, 1) &&
         a.link_bytes_per_second(0, ranks - 1) >= b.link_bytes_per_second(0, ranks - 1) &&
         a.message_overhead_seconds <= b.message_overhead_seconds && a.message_seconds <= b.message_seconds &&
         a.computing_slowdown <= b.computing_slowdown &&
         (a.order == b.order || b.order == MessageOrder::kRounds);
}

// Choices on each transport.
class Pricing {
 public:
  Pricing(const AttentionCase& layer, Pass pass, const PlanOptions& options, const MachineProfile& machine)
      : layer_(layer), pass_(pass), options_(options), machine_(machine) {}

  void Add(const PlanChoice& choice, std::vector<PlanCandidate>* candidates) {
    (void)Candidates(choice, How::kSimulate, candidates);
  }

  // Bounds of all choices, in their order, by as many threads as there are cores.
  void AddBounds(const std::vector<PlanChoice>& choices, std::vector<PlanCandidate>* candidates) {
    constexpr size_t kMostThreads = 8;  // each holds a plan
    // Threads only read them.
    for (const PlanChoice& choice : choices) ProblemOf(ChunkParts(choice));
    std::vector<std::vector<PlanCandidate>> found(choices.size());
    bounded_.resize(choices.size());
    ForEachInThreads(0, choices.size(), kMostThreads, [&](size_t i) {
      bounded_[i] = {choices[i], Candidates(choices[i], How::kBound, &found[i])};
    });
    for (const std::vector<PlanCandidate>& each : found)
      candidates->insert(candidates->end(), each.begin(), each.end());
  }

  // Of a candidate that was only bounded. On a transport that is no faster it takes at least as long.
  void Simulate(PlanCandidate* candidate, std::vector<PlanCandidate>* candidates) {
    const absl::StatusOr<ExchangePlan> plan = Build(candidate->choice);
    ANNULUS_CHECK(plan.ok()) << candidate->name << ": " << plan.status();
    const auto known = std::find_if(bounded_.begin(), bounded_.end(),
                                    [&](const Bounded& each) { return each.choice == candidate->choice; });
    Price(*plan, known->seconds, How::kSimulate, candidate);
    const ExchangeCost cost = MessagesOf(*plan, candidate->transport);
    for (PlanCandidate& other : *candidates) {
      if (other.simulated || !other.refused.ok() || !(other.choice == candidate->choice)) continue;
      if (NoSlower(cost, MessagesOf(*plan, other.transport), layer_.layout.ranks()))
        other.seconds = std::max(other.seconds, candidate->seconds);
    }
  }

 private:
  enum class How { kSimulate, kBound };
  // Those of the choice, on each transport. Returns the seconds of computing steps.
  std::vector<std::vector<double>> Candidates(const PlanChoice& choice, How how,
                                              std::vector<PlanCandidate>* candidates) {
    PlanCandidate candidate;
    candidate.choice = choice;
    candidate.name = NameOf(choice, layer_.layout.ranks());
    candidate.transport = options_.transports[0];
    const absl::StatusOr<ExchangePlan> plan = Build(choice);
    if (plan.ok()) {
      candidate.name = plan->name;
      candidate.buffer_bytes = BufferBytesOf(layer_, *plan);
    }
    candidate.refused = plan.ok() ? CheckBuffers(candidate) : plan.status();
    if (!candidate.refused.ok()) {
      candidates->push_back(candidate);
      return {};
    }
    std::vector<std::vector<double>> seconds = ComputeSecondsOf(layer_, *plan, machine_);
    for (const TransportKind transport : options_.transports) {
      candidate.transport = transport;
      candidate.refused = CheckLinks(machine_, transport, layer_.layout.ranks());
      if (candidate.refused.ok()) Price(*plan, seconds, how, &candidate);
      candidates->push_back(candidate);
    }
    return seconds;
  }

  absl::StatusOr<ExchangePlan> Build(const PlanChoice& choice) {
    return BuildPlan(ProblemOf(ChunkParts(choice)), pass_, choice);
  }

  const ExchangeProblem& ProblemOf(int parts) {
    const auto known = problems_.find(parts);
    if (known != problems_.end()) return known->second;
    return problems_[parts] = MakeExchangeProblem(layer_.layout, layer_.sequences, layer_.window,
                                                  layer_.heads, layer_.kv_heads, parts);
  }

  absl::Status CheckBuffers(const PlanCandidate& candidate) const {
    if (options_.buffer_bytes == 0 || candidate.buffer_bytes <= options_.buffer_bytes)
      return absl::OkStatus();
    return absl::ResourceExhaustedError(
        absl::StrCat(candidate.name, ": buffers of ", BytesText(candidate.buffer_bytes),
                     " on a rank: expected at most ", BytesText(options_.buffer_bytes)));
  }

  ExchangeCost MessagesOf(const ExchangePlan& plan, TransportKind transport) const {
    return MessageCostOf(layer_, plan, machine_, transport, options_.throttle);
  }

  void Price(const ExchangePlan& plan, const std::vector<std::vector<double>>& seconds, How how,
             PlanCandidate* candidate) const {
    ExchangeCost cost = MessagesOf(plan, candidate->transport);
    candidate->simulated = how == How::kSimulate;
    if (!candidate->simulated) {
      const Bound bound = BoundOf(plan, seconds, cost);
      candidate->seconds = bound.seconds;
      candidate->bytes_sent = bound.bytes_sent;
      return;
    }
    SetComputing(layer_, plan, machine_, candidate->transport, options_.throttle,
                 std::make_shared<const StepSeconds>(seconds), &cost);
    SetPredicted(annulus::Simulate(plan, cost), candidate);
  }

  const AttentionCase& layer_;
  const Pass pass_;
  const PlanOptions& options_;
  const MachineProfile& machine_;
  std::map<int, ExchangeProblem> problems_;  // by parts
  struct Bounded {
    PlanChoice choice;
    std::vector<std::vector<double>> seconds;  // of computing steps
  };
  std::vector<Bounded> bounded_;
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

void Sort(std::vector<PlanCandidate>* candidates) {
  const auto place = [](const PlanCandidate& c) {
    return c.refused.ok() ? std::tuple(c.simulated ? 0 : 1, TimePlace(c), c.buffer_bytes, c.bytes_sent)
                          : std::tuple(2, 0.0, int64_t{0}, int64_t{0});
  };
  std::stable_sort(candidates->begin(), candidates->end(),
                   [&](const PlanCandidate& a, const PlanCandidate& b) { return place(a) < place(b); });
}

// ---- Many ranks ---------------------------------------------------------------------------------

// Simulates in order of the bounds, until what is left cannot be faster by more than kWorthIt, or enough were
// simulated of a group whose messages let nothing come near its bound.
constexpr double kWorthIt = 0.01;
constexpr int kMostSimulated = 80;

void SimulateTheBest(Pricing* pricing, std::vector<PlanCandidate>* candidates) {
  Sort(candidates);
  double fastest = std::numeric_limits<double>::infinity();
  int simulated = 0;
  for (PlanCandidate& candidate : *candidates) {
    const bool worth_it = candidate.refused.ok() && candidate.seconds < fastest * (1 - kWorthIt);
    if (!worth_it) continue;
    if (simulated == kMostSimulated) break;
    pricing->Simulate(&candidate, candidates);
    fastest = std::min(fastest, candidate.seconds);
    ++simulated;
  }
  Sort(candidates);
}

// ---- Parts --------------------------------------------------------------------------------------

// Ulysses, whose heads go over all ranks, has one block.
bool ReadsParts(const PlanChoice& choice, int ranks) {
  if (choice.head_split == ranks) return false;
  PlanChoice two = choice;
  two.parts = 2;
  return ChunkParts(two) != ChunkParts(choice);
}

// The fastest choices of a few kinds, in one part, that could become the fastest: a block in parts is waited
// for less, since its first part is there earlier, but not computed with in less time.
constexpr size_t kKindsInParts = 3;

std::vector<PlanCandidate> WorthParts(const std::vector<PlanCandidate>& candidates, int ranks) {
  std::vector<PlanCandidate> worth;
  for (const PlanCandidate& candidate : candidates) {
    if (!candidate.refused.ok() || !candidate.simulated || worth.size() == kKindsInParts) break;
    const double computing = candidate.seconds - candidate.exposed_seconds;
    if (!ReadsParts(candidate.choice, ranks) || computing > candidates[0].seconds * (1 - kWorthIt)) continue;
    const bool known = std::any_of(worth.begin(), worth.end(),
                                   [&](const PlanCandidate& each) { return SameKind(each, candidate); });
    if (!known) worth.push_back(candidate);
  }
  return worth;
}

// Of each the numbers of parts in order, as long as one makes it faster than the one before.
void TryParts(const std::vector<int>& parts, int ranks, Pricing* pricing,
              std::vector<PlanCandidate>* candidates) {
  for (const PlanCandidate& whole : WorthParts(*candidates, ranks)) {
    double fastest = whole.seconds;
    for (const int count : parts) {
      const size_t before = candidates->size();
      PlanChoice choice = whole.choice;
      choice.parts = count;
      pricing->Add(choice, candidates);
      const double last = fastest;
      for (size_t i = before; i < candidates->size(); ++i) {
        const PlanCandidate& tried = (*candidates)[i];
        if (tried.refused.ok()) fastest = std::min(fastest, tried.seconds);
      }
      if (fastest == last) break;
    }
  }
  Sort(candidates);
}

// ---- About as fast ------------------------------------------------------------------------------

// Predictions are good to a few per cent, and ranks that drift apart wait longer for each other than any
// prediction says. So of what is about as fast the plan goes first that waits least, of these the one that
// sends least, and of one plan's transports NCCL last, which takes multiprocessors from computing.
constexpr double kAboutAsFast = 0.02;
constexpr double kNoticed = 0.001;  // waiting, of a pass

void PreferTheCalmest(std::vector<PlanCandidate>* candidates) {
  if (candidates->empty() || !candidates->front().refused.ok()) return;
  const double fastest = candidates->front().seconds;
  const auto slower = std::find_if(candidates->begin(), candidates->end(), [&](const PlanCandidate& c) {
    return !c.refused.ok() || !c.simulated || c.seconds > fastest * (1 + kAboutAsFast);
  });
  const auto place = [&](const PlanCandidate& c) {
    return std::tuple(std::round(c.exposed_seconds / (fastest * kNoticed)), c.bytes_sent,
                      c.transport == TransportKind::kNccl);
  };
  const auto calmest =
      std::min_element(candidates->begin(), slower,
                       [&](const PlanCandidate& a, const PlanCandidate& b) { return place(a) < place(b); });
  std::rotate(candidates->begin(), calmest, calmest + 1);
}

}  // namespace

void SetPredicted(const Simulation& simulation, PlanCandidate* candidate) {
  candidate->simulated = true;
  candidate->seconds = simulation.makespan;
  std::vector<double> ends;
  for (size_t r = 0; r < simulation.compute.size(); ++r)
    ends.push_back(simulation.compute[r] + simulation.exposed[r]);
  const auto slowest = std::max_element(ends.begin(), ends.end()) - ends.begin();
  candidate->exposed_seconds = simulation.exposed[static_cast<size_t>(slowest)];
  candidate->bytes_sent = *std::max_element(simulation.bytes_sent.begin(), simulation.bytes_sent.end());
}

std::vector<PlanCandidate> RankPlans(const AttentionCase& layer, Pass pass, const PlanOptions& options,
                                     const MachineProfile& machine) {
  ANNULUS_CHECK(!options.transports.empty()) << "no transport to choose from";
  Pricing pricing(layer, pass, options, machine);
  const int ranks = layer.layout.ranks();
  const std::vector<PlanChoice> plans =
      options.plans.empty() ? AllChoices(ranks, layer.heads) : options.plans;
  const bool many = ranks > kSimulateAllRanks && plans.size() > 1;
  std::vector<PlanCandidate> candidates;
  if (many) {
    pricing.AddBounds(plans, &candidates);
    SimulateTheBest(&pricing, &candidates);
  } else {
    for (const PlanChoice& choice : plans) pricing.Add(choice, &candidates);
    Sort(&candidates);
  }
  TryParts(options.parts, ranks, &pricing, &candidates);
  PreferTheCalmest(&candidates);
  return candidates;
}

std::string WhyItWon(const std::vector<PlanCandidate>& ranked) {
  if (ranked.empty() || !ranked[0].refused.ok()) return "no plan can be";
  const PlanCandidate& won = ranked[0];
  const auto is_other = [&](const PlanCandidate& candidate) { return !SameKind(candidate, won); };
  const auto other = std::find_if(ranked.begin(), ranked.end(), is_other);
  if (other == ranked.end()) return absl::StrCat(Described(won), ": the only kind that may be");
  // The refused come last, and before them what was not simulated.
  if (!other->refused.ok()) return absl::StrCat(Described(won), ": no other kind can be");
  if (!other->simulated) return absl::StrCat(Described(won), ": others take about as long or longer");
  const double exposed = other->exposed_seconds - won.exposed_seconds;
  const double computed = other->seconds - won.seconds - exposed;
  const std::string exposes = absl::StrCat("exposes ", Milliseconds(exposed), " more");
  std::string reason = absl::StrCat("which computes ", Milliseconds(computed), " longer");
  if (exposed > computed) reason = "which " + exposes;
  if (other->seconds < won.seconds)
    reason = "which is about as fast but " + (exposed > 0 ? exposes : "sends more");
  if (TimePlace(*other) == TimePlace(won)) {
    reason = exposed > kNoticed * won.seconds         ? "which " + exposes
             : other->buffer_bytes > won.buffer_bytes ? "which needs more memory"
             : other->bytes_sent > won.bytes_sent     ? "which sends more"
                                                      : "which is as good";
  }
  return absl::StrCat(Described(won), "; next ", Described(*other), ", ", reason);
}

}  // namespace annulus
