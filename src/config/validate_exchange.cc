#include "validate_exchange.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "annulus/base/nearest.h"

namespace annulus::config {
namespace {

// The fields of one PassPlan message, with findings named by its path.
class PassPlanCheck {
 public:
  PassPlanCheck(const PassPlanSpec& spec, int64_t cp, const std::string& path,
                std::vector<std::string>* findings)
      : spec_(spec), cp_(cp), path_(path), findings_(findings) {}

  void Run() const {
    if (cp_ < 1) return;  // refused on its own
    CheckHeadSplit();
    CheckInner();
    CheckDirection();
    CheckParts();
    CheckOutputWidth();
  }

 private:
  bool Is(std::initializer_list<PlanName> names) const {
    return std::count(names.begin(), names.end(), spec_.plan) > 0;
  }

  template <typename T>
  void Add(absl::string_view field, const T& value, absl::string_view expected) const {
    findings_->push_back(absl::StrCat(path_, ".", field, "=", value, ": expected ", expected));
  }

  void CheckHeadSplit() const {
    if (Is({PlanName::kUlysses}) && spec_.head_split != 0 && spec_.head_split != cp_) {
      Add("head_split", spec_.head_split,
          absl::StrCat("0 or parallel.cp=", cp_, " with plan=ULYSSES (nearest valid value ", cp_, ")"));
    } else if (Is({PlanName::kArena}) && spec_.head_split > 1) {
      Add("head_split", spec_.head_split,
          "0 or 1 with plan=ARENA, whose ranks compute all heads (nearest valid value 1)");
    } else if (spec_.head_split > 0 && cp_ % spec_.head_split != 0) {
      Add("head_split", spec_.head_split,
          absl::StrCat("0 or a divisor of parallel.cp=", cp_, NearestDivisor(spec_.head_split, cp_)));
    }
  }

  // Of the groups between which heads are not split.
  void CheckInner() const {
    if (spec_.inner == 0) return;
    if (!Is({PlanName::kDoubleRing, PlanName::kMesh, PlanName::kAuto})) {
      return Add("inner", spec_.inner,
                 absl::StrCat("0 with plan=", Name(spec_.plan),
                              ", since only DOUBLE_RING and MESH have it (nearest valid value 0)"));
    }
    const int64_t split = std::max<int64_t>(1, spec_.head_split);
    if (cp_ % split != 0 || cp_ / split % spec_.inner == 0) return;
    Add("inner", spec_.inner,
        absl::StrCat("0 or a divisor of parallel.cp=", cp_,
                     split > 1 ? absl::StrCat(" / head_split=", split) : "",
                     NearestDivisor(spec_.inner, cp_ / split)));
  }

  void CheckDirection() const {
    if (spec_.direction == RingDirection::kFewestRows) return;
    if (Is({PlanName::kKvRing, PlanName::kTokenRing, PlanName::kAuto})) return;
    const bool lower = spec_.direction == RingDirection::kTowardLower;
    Add("direction", lower ? "TOWARD_LOWER" : "TOWARD_HIGHER",
        absl::StrCat("FEWEST_ROWS with plan=", Name(spec_.plan), ", which is no one-way ring"));
  }

  void CheckParts() const {
    if (spec_.parts <= 1) return;
    if (!Is({PlanName::kBalanced, PlanName::kDoubleRing, PlanName::kMesh, PlanName::kUlysses})) return;
    Add("parts", spec_.parts,
        absl::StrCat("0 or 1 with plan=", Name(spec_.plan),
                     ", whose blocks travel whole (nearest valid value 1)"));
  }

  void CheckOutputWidth() const {
    if (spec_.output_width == Width::kAccumulator) return;
    if (Is({PlanName::kTokenRing, PlanName::kBidirectionalTokenRing, PlanName::kBalanced, PlanName::kMesh,
            PlanName::kAuto})) {
      return;
    }
    Add("output_width", "COMPUTE",
        absl::StrCat("ACCUMULATOR with plan=", Name(spec_.plan), ", by which no partial outputs travel"));
  }

  const PassPlanSpec& spec_;
  int64_t cp_;
  std::string path_;
  std::vector<std::string>* findings_;
};

}  // namespace

void CheckExchange(const ParallelSpec& parallel, std::vector<std::string>* findings) {
  const ExchangeSpec& exchange = parallel.exchange;
  const std::string path = "parallel.exchange";
  const bool both_used = !exchange.forward.has_value() || !exchange.backward.has_value();
  if (both_used) PassPlanCheck(exchange.both, parallel.cp, path, findings).Run();
  for (const auto& [name, own] :
       {std::pair("forward", &exchange.forward), {"backward", &exchange.backward}}) {
    if (!own->has_value()) continue;
    PassPlanCheck(**own, parallel.cp, absl::StrCat(path, ".", name), findings).Run();
  }
}

}  // namespace annulus::config
