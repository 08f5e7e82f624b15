// Whether a model can be split over tensor-parallel ranks. Heads are never cut; keys and values, and groups
// of Mamba-2, that are fewer than ranks are on every rank.

#include <algorithm>

#include "absl/strings/str_join.h"
#include "annulus/base/nearest.h"
#include "annulus/model/spec.h"

namespace annulus {
namespace {

constexpr int64_t kMostRanks = int64_t{1} << 16;  // up to which the nearest valid size is searched

// What a field asks of the number of ranks.
struct Condition {
  enum class Kind { kDivisor, kDivisorOrMultiple, kAtMost };
  Kind kind;
  const char* field;
  int64_t value;

  bool Holds(int64_t tp) const {
    if (kind == Kind::kAtMost) return tp <= value;
    return value % tp == 0 || (kind == Kind::kDivisorOrMultiple && tp % value == 0);
  }
  std::string expected() const {
    constexpr const char* kTexts[] = {"a divisor of", "a divisor or a multiple of", "at most"};
    return absl::StrCat(kTexts[static_cast<int>(kind)], " model.", field, "=", value);
  }
};

std::vector<Condition> ConditionsOf(const ModelSpec& spec) {
  using Kind = Condition::Kind;
  std::vector<Condition> all;
  const auto add = [&](BranchKind branch, Kind kind, const char* field, int64_t value) {
    if (Uses(spec, branch)) all.push_back({kind, field, value});
  };
  add(BranchKind::kAttention, Kind::kDivisor, "attention.heads", spec.heads);
  add(BranchKind::kAttention, Kind::kDivisorOrMultiple, "attention.kv_heads", spec.kv_heads);
  add(BranchKind::kMlp, Kind::kDivisor, "mlp.d_ff", spec.d_ff);
  add(BranchKind::kLatentAttention, Kind::kDivisor, "latent.heads", spec.latent.heads);
  add(BranchKind::kMamba, Kind::kDivisor, "mamba.heads", spec.mamba.heads);
  add(BranchKind::kMamba, Kind::kDivisorOrMultiple, "mamba.groups", spec.mamba.groups);
  add(BranchKind::kLightning, Kind::kDivisor, "lightning.heads", spec.lightning.heads);
  add(BranchKind::kBased, Kind::kDivisor, "based.heads", spec.based.heads);
  add(BranchKind::kDeltaNet, Kind::kDivisor, "delta.heads", spec.delta.heads);
  all.push_back({Kind::kAtMost, "vocab_size", spec.vocab_size});
  return all;
}

bool AllHold(const std::vector<Condition>& conditions, int64_t tp) {
  return std::all_of(conditions.begin(), conditions.end(),
                     [&](const Condition& condition) { return condition.Holds(tp); });
}

}  // namespace

absl::Status ValidateShards(const ModelSpec& spec, int64_t tp) {
  if (tp < 1) return Invalid("parallel.tp=", tp, ": expected at least 1 (nearest valid value 1)");
  const std::vector<Condition> conditions = ConditionsOf(spec);
  if (AllHold(conditions, tp)) return absl::OkStatus();
  int64_t below = std::min(tp, kMostRanks), above = tp;
  while (!AllHold(conditions, below)) --below;  // one rank always does
  while (above <= kMostRanks && !AllHold(conditions, above)) ++above;
  const std::string nearest = NearestOf(below, above <= kMostRanks ? above : below);
  std::vector<std::string> lines;
  for (const Condition& condition : conditions) {
    if (condition.Holds(tp)) continue;
    lines.push_back(absl::StrCat("parallel.tp=", tp, ": expected ", condition.expected(), nearest));
  }
  return absl::InvalidArgumentError(absl::StrJoin(lines, "\n"));
}

}  // namespace annulus
