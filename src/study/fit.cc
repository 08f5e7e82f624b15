#include "annulus/study/fit.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <optional>
#include <set>

#include "absl/strings/str_format.h"
#include "annulus/base/check.h"
#include "annulus/base/threads.h"
#include "annulus/train/config.h"
#include "annulus/train/ranges.h"
#include "annulus/train/report.h"
#include "fit_bound.h"

namespace annulus {
namespace {

// From the fastest to that which keeps least.
constexpr Recompute kPolicies[] = {Recompute::kNone, Recompute::kElementwise, Recompute::kAttentionOutput,
                                   Recompute::kBlock};

// Looked at side by side; not as many as there are cores, so that results do not depend on them.
constexpr size_t kBatch = 4;
constexpr size_t kMostThreads = 64;
// All plans are searched for so many of the fastest, as far as their groups are small enough for it.
constexpr size_t kThorough = 3;

std::string GiB(int64_t bytes) { return FormatBytes(static_cast<double>(bytes)); }

std::vector<int64_t> DivisorsOf(int64_t n) {
  std::vector<int64_t> divisors, larger;
  for (int64_t d = 1; d <= n / d; ++d) {
    if (n % d != 0) continue;
    divisors.push_back(d);
    if (d < n / d) larger.push_back(n / d);
  }
  divisors.insert(divisors.end(), larger.rbegin(), larger.rend());
  return divisors;
}

// And more than one.
bool HasFewPlans(const FitLayout& layout) {
  return layout.cp > 1 && EffortFor(layout.cp) == PlanEffort::kAll;
}

// A mesh with a micro-batch.
struct Trial {
  FitLayout layout;                        // with the least recomputing that may fit
  double bound = 0;                        // seconds at least
  std::optional<StepCost> cost = {};       // with its plans
  std::optional<FitCandidate> found = {};  // simulated
  int64_t needed_bytes = 0;                // with those of the least memory that were looked at
  std::string lost = {};                   // why it cannot be
  bool settled = false;
};

class Search {
 public:
  Search(const RunSpec& spec, const MachineProfile& machine, const FitOptions& options)
      : spec_(spec), machine_(machine), options_(options) {
    result_.memory_bytes = options.memory_bytes > 0 ? options.memory_bytes : machine.memory_bytes;
  }

  absl::StatusOr<FitResult> Run() {
    for (const int64_t tp : DivisorsOf(options_.ranks)) {
      for (const int64_t cp : DivisorsOf(options_.ranks / tp)) {
        AddMesh({.dp = options_.ranks / tp / cp, .cp = cp, .tp = tp});
      }
    }
    ForEachInThreads(0, trials_.size(), kMostThreads, [&](size_t i) { SetBound(&trials_[i]); });
    Predict();
    SearchAllPlans();
    if (result_.best.empty()) return Nothing();
    return std::move(result_);
  }

 private:
  // With every micro-batch for which it may fit.
  void AddMesh(const FitLayout& mesh) {
    const int per_host = machine_.network.ranks_per_host;
    if (per_host > 0 && per_host % mesh.tp != 0)
      return Lose(mesh, absl::StrCat("parallel.tp=", mesh.tp, " leaves hosts of ", per_host, " ranks"));
    const absl::Status valid = ValidateForWorld(WithLayout(spec_, mesh), options_.ranks);
    if (spec_.optim.sequences_per_step % mesh.dp != 0) {
      return Lose(mesh, absl::StrCat("optim.sequences_per_step=", spec_.optim.sequences_per_step,
                                     " is no multiple of dp"));
    }
    if (!valid.ok()) {
      const std::string text(valid.message());
      return Lose(mesh, text.substr(0, text.find('\n')));
    }
    bool any = false;
    for (const int64_t micro_batch : DivisorsOf(spec_.optim.sequences_per_step / mesh.dp)) {
      FitLayout layout = mesh;
      layout.micro_batch = micro_batch;
      const std::optional<Recompute> policy = LeastRecomputing(layout);
      if (!policy.has_value()) break;  // larger ones take more
      layout.recompute = *policy;
      any = true;
      trials_.push_back({.layout = layout});
    }
    if (any) return;
    FitLayout least = mesh;
    least.recompute = Recompute::kBlock;
    DoesNotFit(least, LeastBytes(WithLayout(spec_, least), machine_));
  }

  std::optional<Recompute> LeastRecomputing(FitLayout layout) const {
    for (const Recompute policy : kPolicies) {
      layout.recompute = policy;
      if (Fits(LeastBytes(WithLayout(spec_, layout), machine_))) return policy;
    }
    return std::nullopt;
  }

  bool Fits(int64_t bytes) const { return result_.memory_bytes == 0 || bytes <= result_.memory_bytes; }

  void SetBound(Trial* trial) const {
    if (options_.search == FitSearch::kEvery) return;
    const absl::StatusOr<double> bound = LeastSeconds(WithLayout(spec_, trial->layout), machine_);
    if (bound.ok()) trial->bound = *bound;  // else choosing its plans says what is wrong
  }

  // Until nothing that is left can be among those shown.
  void Predict() {
    std::vector<size_t> open(trials_.size());
    std::iota(open.begin(), open.end(), size_t{0});
    while (!open.empty()) {
      std::sort(open.begin(), open.end(), [&](size_t a, size_t b) {
        return std::pair(trials_[a].bound, a) < std::pair(trials_[b].bound, b);
      });
      if (!MayBeShown(trials_[open[0]])) break;
      const size_t count = TakeTogether(&open);
      ForEachInThreads(0, count, kBatch, [&](size_t i) {
        if (MayBeShown(trials_[open[i]])) GoOn(&trials_[open[i]]);
      });
      for (size_t i = 0; i < count; ++i) {
        Trial& trial = trials_[open[i]];
        if (trial.cost.has_value())
          priced_[{trial.layout.cp, trial.layout.tp}] = {trial.layout.micro_batch, trial.cost->exchanges};
        if (trial.settled) Take(std::move(trial));
      }
      std::erase_if(open, [&](size_t i) { return trials_[i].settled; });
      Report(open.size());
    }
    for (const size_t i : open) {
      const double fastest = result_.best.front().figures.step_seconds;
      Lose(trials_[i].layout, "slower than those shown by what it takes at least",
           absl::StrFormat("+%.1f%% or more", 100 * (trials_[i].bound / fastest - 1)));
    }
    Report(0);
  }

  // Moves a batch to the front. Plans are chosen for one micro-batch of a mesh at a time: they say much of
  // the others.
  size_t TakeTogether(std::vector<size_t>* open) const {
    std::set<std::pair<int64_t, int64_t>> choosing;
    const auto last = std::stable_partition(open->begin(), open->end(), [&](size_t i) {
      const FitLayout& layout = trials_[i].layout;
      return trials_[i].cost.has_value() || choosing.insert({layout.cp, layout.tp}).second;
    });
    return std::min(kBatch, static_cast<size_t>(last - open->begin()));
  }

  bool MayBeShown(const Trial& trial) const {
    return options_.search == FitSearch::kEvery || result_.best.size() < options_.shown ||
           trial.bound <= result_.best.back().figures.step_seconds;
  }

  void Report(size_t open) const {
    if (!options_.progress) return;
    const auto out_of_reach = [&](const Trial& trial) { return !trial.settled && !MayBeShown(trial); };
    const auto slow = open == 0 ? 0 : std::count_if(trials_.begin(), trials_.end(), out_of_reach);
    options_.progress({.layouts = trials_.size(),
                       .settled = trials_.size() - open + static_cast<size_t>(slow),
                       .predicted = result_.predicted});
  }

  // First to its plans, then to its step.
  void GoOn(Trial* trial) const {
    if (!trial->cost.has_value()) {
      if (!RaiseBound(trial)) ChoosePlans(trial);
      return;
    }
    const RunSpec spec = WithLayout(spec_, trial->layout);
    trial->found = {.layout = trial->layout, .figures = SimulateStep(spec, machine_, *trial->cost)};
    trial->cost.reset();
    trial->settled = true;
  }

  // By the plans of another micro-batch that were chosen meanwhile. Whether it did. (Where there are few,
  // memory may make a layout choose from others.)
  bool RaiseBound(Trial* trial) const {
    const auto known = priced_.find({trial->layout.cp, trial->layout.tp});
    if (known == priced_.end() || HasFewPlans(trial->layout)) return false;
    const Priced& other = known->second;
    const absl::StatusOr<double> bound =
        LeastSeconds(WithLayout(spec_, trial->layout), machine_,
                     ExchangesAtLeast(other.exchanges, other.micro_batch, trial->layout.micro_batch));
    if (!bound.ok() || *bound <= trial->bound) return false;
    trial->bound = *bound;
    return true;
  }

  // Plans may need buffers for which others must be found, or more be recomputed.
  void ChoosePlans(Trial* trial) const {
    for (const Recompute policy : kPolicies) {
      if (policy < trial->layout.recompute) continue;
      trial->layout.recompute = policy;
      const RunSpec spec = WithLayout(spec_, trial->layout);
      for (const PlanEffort effort : {PlanEffort::kQuick, PlanEffort::kAll}) {
        if (effort == PlanEffort::kAll && !HasFewPlans(trial->layout)) continue;
        absl::StatusOr<StepCost> cost = CostOfStep(spec, machine_, effort);
        if (!cost.ok()) {
          trial->lost = std::string(cost.status().message());
          trial->settled = true;
          return;
        }
        trial->needed_bytes = cost->memory.total() + cost->other_memory_bytes;
        if (!Fits(trial->needed_bytes)) continue;
        if (options_.search == FitSearch::kBounded)
          trial->bound = std::max(trial->bound, LeastSeconds(spec, machine_, *cost));
        trial->cost = *std::move(cost);
        return;
      }
    }
    trial->settled = true;
  }

  void Take(Trial trial) {
    if (!trial.lost.empty()) return Lose(trial.layout, trial.lost);
    if (!trial.found.has_value()) return DoesNotFit(trial.layout, trial.needed_bytes);
    ++result_.predicted;
    result_.best.push_back(*std::move(trial.found));
    Sort();
    if (result_.best.size() <= options_.shown) return;
    const FitCandidate last = std::move(result_.best.back());
    result_.best.pop_back();
    LoseToBest(last);
  }

  void Sort() {
    std::stable_sort(result_.best.begin(), result_.best.end(),
                     [](const FitCandidate& a, const FitCandidate& b) {
                       return a.figures.step_seconds < b.figures.step_seconds;
                     });
  }

  // What most of the time that it takes longer goes into.
  void LoseToBest(const FitCandidate& loser) {
    const StepFigures &best = result_.best.front().figures, &its = loser.figures;
    const std::pair<const char*, double> longer[] = {
        {"computes longer", its.compute_seconds - best.compute_seconds},
        {"exposes exchanges", its.exposed_exchange_seconds - best.exposed_exchange_seconds},
        {"exposes gradients and parameters", its.exposed_gradients_seconds - best.exposed_gradients_seconds},
        {"exposes tensor parallelism", its.exposed_tensor_seconds - best.exposed_tensor_seconds},
        {"waits for slower ranks", its.bubble_seconds - best.bubble_seconds}};
    const auto* most = std::max_element(std::begin(longer), std::end(longer),
                                        [](const auto& a, const auto& b) { return a.second < b.second; });
    Lose(loser.layout, absl::StrCat("slower: ", most->first),
         absl::StrFormat("+%.1f%%", 100 * (its.step_seconds / best.step_seconds - 1)));
  }

  void DoesNotFit(const FitLayout& layout, int64_t needed) {
    if (closest_bytes_ == 0 || needed < closest_bytes_) closest_ = layout, closest_bytes_ = needed;
    Lose(layout, absl::StrCat("does not fit in ", MemoryLimit()), GiB(needed));
  }

  std::string MemoryLimit() const {
    return absl::StrCat(GiB(result_.memory_bytes), options_.memory_bytes > 0
                                                       ? ", the memory that was given"
                                                       : ", memory_bytes of the machine profile");
  }

  void Lose(const FitLayout& layout, const std::string& reason, const std::string& detail = "") {
    std::string text = MeshText(layout);
    if (layout.micro_batch > 1) absl::StrAppend(&text, ", micro-batch ", layout.micro_batch);
    if (!detail.empty()) absl::StrAppend(&text, " (", detail, ")");
    for (FitLosers& losers : result_.losers) {
      if (losers.reason == reason) return losers.layouts.push_back(std::move(text));
    }
    result_.losers.push_back({.reason = reason, .layouts = {std::move(text)}});
  }

  // With the plans that the trainer would find.
  void SearchAllPlans() {
    for (size_t i = 0; i < std::min(kThorough, result_.best.size()); ++i) {
      FitCandidate& candidate = result_.best[i];
      if (!HasFewPlans(candidate.layout)) continue;
      const RunSpec spec = WithLayout(spec_, candidate.layout);
      const absl::StatusOr<StepCost> cost = CostOfStep(spec, machine_);
      if (!cost.ok()) continue;
      StepFigures figures = SimulateStep(spec, machine_, *cost);
      if (Fits(figures.memory_bytes())) candidate.figures = std::move(figures);
    }
    Sort();
  }

  absl::Status Nothing() const {
    const std::string ranks = CountText(options_.ranks, "rank");
    if (closest_bytes_ > 0) {
      return Invalid("memory: no layout on ", ranks, " fits: ", MeshText(closest_), ", micro-batch ",
                     closest_.micro_batch, ", recompute ", Name(closest_.recompute), " needs least, ",
                     GiB(closest_bytes_), " on a rank, expected at most ", MemoryLimit());
    }
    ANNULUS_CHECK(!result_.losers.empty()) << "no layouts";
    const FitLosers& first = result_.losers.front();
    return Invalid("no layout on ", ranks, " can be: ", first.layouts.front(), ": ", first.reason);
  }

  // The exchanges of a mesh, with one micro-batch.
  struct Priced {
    int64_t micro_batch = 1;
    std::vector<ExchangePass> exchanges;
  };

  const RunSpec& spec_;
  const MachineProfile& machine_;
  const FitOptions& options_;
  std::map<std::pair<int64_t, int64_t>, Priced> priced_;  // by cp and tp
  std::vector<Trial> trials_;
  FitResult result_;
  FitLayout closest_;  // of those that do not fit
  int64_t closest_bytes_ = 0;
};

}  // namespace

const char* Name(Recompute policy) {
  constexpr const char* kNames[] = {"NONE", "ELEMENTWISE", "ATTENTION_OUTPUT", "BLOCK"};
  return kNames[static_cast<int>(policy)];
}

std::string MeshText(const FitLayout& layout) { return MeshText(layout.dp, layout.cp, layout.tp); }

std::string OverridesText(const FitLayout& layout) {
  return absl::StrCat("--set parallel.dp=", layout.dp, " --set parallel.cp=", layout.cp,
                      " --set parallel.tp=", layout.tp, " --set optim.micro_batch=", layout.micro_batch,
                      " --set recompute=", Name(layout.recompute));
}

RunSpec WithLayout(RunSpec spec, const FitLayout& layout) {
  spec.parallel.dp = layout.dp;
  spec.parallel.cp = layout.cp;
  spec.parallel.tp = layout.tp;
  spec.optim.micro_batch = layout.micro_batch;
  spec.recompute = layout.recompute;
  return spec;
}

absl::StatusOr<FitResult> Fit(const RunSpec& spec, const MachineProfile& machine, const FitOptions& options) {
  if (options.ranks > kRanksRange.high)
    return Invalid("--gpus=", options.ranks, ": expected at most ", kRanksRange.high, " ranks");
  ANNULUS_RETURN_IF_ERROR(CheckNetwork(spec.device, machine, options.ranks));
  return Search(spec, machine, options).Run();
}

}  // namespace annulus
