#include "annulus/study/fit.h"

#include <algorithm>
#include <limits>
#include <optional>

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

// Predicted side by side; not as many as there are cores, so that results do not depend on them.
constexpr size_t kBatch = 8;
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
  FitLayout layout;  // with the least recomputing that may fit
  double bound = 0;  // seconds
  std::optional<FitCandidate> found = {};
  std::string lost = {};  // why there is none
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
    std::stable_sort(trials_.begin(), trials_.end(),
                     [](const Trial& a, const Trial& b) { return a.bound < b.bound; });
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
      const absl::StatusOr<double> bound = ComputingSeconds(WithLayout(spec_, layout), machine_);
      if (!bound.ok()) return Lose(mesh, std::string(bound.status().message()));
      trials_.push_back({.layout = layout, .bound = *bound});
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

  // In order of bounds, until nothing that is left can be among those shown.
  void Predict() {
    for (size_t first = 0; first < trials_.size(); first += kBatch) {
      const size_t last = std::min(first + kBatch, trials_.size());
      const double slowest_shown = result_.best.size() < options_.shown
                                       ? std::numeric_limits<double>::infinity()
                                       : result_.best.back().figures.step_seconds;
      ForEachInThreads(first, last, kBatch, [&](size_t i) {
        if (trials_[i].bound <= slowest_shown) PredictTrial(&trials_[i]);
      });
      for (size_t i = first; i < last; ++i) Take(std::move(trials_[i]));
    }
  }

  // Plans may need buffers for which others must be found, or more be recomputed.
  void PredictTrial(Trial* trial) const {
    for (const Recompute policy : kPolicies) {
      if (policy < trial->layout.recompute) continue;
      trial->layout.recompute = policy;
      for (const PlanEffort effort : {PlanEffort::kQuick, PlanEffort::kAll}) {
        if (effort == PlanEffort::kAll && !HasFewPlans(trial->layout)) continue;
        absl::StatusOr<StepFigures> figures = PredictStep(WithLayout(spec_, trial->layout), machine_, effort);
        if (!figures.ok()) {
          trial->lost = std::string(figures.status().message());
          return;
        }
        trial->found = {.layout = trial->layout, .figures = *std::move(figures)};
        if (Fits(trial->found->figures.memory_bytes())) return;
      }
    }
  }

  void Take(Trial trial) {
    if (!trial.lost.empty()) return Lose(trial.layout, trial.lost);
    if (!trial.found.has_value())
      return Lose(trial.layout, "computing alone takes longer than a step of those shown");
    ++result_.predicted;
    const int64_t needed = trial.found->figures.memory_bytes();
    if (!Fits(needed)) return DoesNotFit(trial.layout, needed);
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
    Lose(layout, absl::StrCat("does not fit in ", GiB(result_.memory_bytes)), GiB(needed));
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
      absl::StatusOr<StepFigures> figures = PredictStep(WithLayout(spec_, candidate.layout), machine_);
      if (figures.ok() && Fits(figures->memory_bytes())) candidate.figures = *std::move(figures);
    }
    Sort();
  }

  absl::Status Nothing() const {
    const std::string ranks = CountText(options_.ranks, "rank");
    if (closest_bytes_ > 0) {
      return Invalid("memory: no layout on ", ranks, " fits: ", MeshText(closest_), ", micro-batch ",
                     closest_.micro_batch, ", recompute ", Name(closest_.recompute), " needs least, ",
                     GiB(closest_bytes_), " on a rank, expected at most ", GiB(result_.memory_bytes));
    }
    ANNULUS_CHECK(!result_.losers.empty()) << "no layouts";
    const FitLosers& first = result_.losers.front();
    return Invalid("no layout on ", ranks, " can be: ", first.layouts.front(), ": ", first.reason);
  }

  const RunSpec& spec_;
  const MachineProfile& machine_;
  const FitOptions& options_;
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
  return Search(spec, machine, options).Run();
}

}  // namespace annulus
