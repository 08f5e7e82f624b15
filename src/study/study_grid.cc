#include <algorithm>
#include <map>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_join.h"
#include "annulus/base/hash.h"
#include "annulus/study/study_run.h"
#include "annulus/train/ranges.h"
#include "annulus/train/report.h"
#include "study_key.h"

namespace annulus {
namespace {

constexpr size_t kLongestId = 120;

// One value of every axis.
struct Choice {
  int64_t hosts = 1, ranks_per_host = 1;
  std::vector<StudyPoint::Label> labels;
  std::vector<std::string> others;  // overrides, those of the mesh left out
  int64_t dp = 0, cp = 0, tp = 0;   // 0: no axis
};

// A file name that tells points apart: what may not be in one, or is too long, is told apart by a hash.
std::string IdOf(const std::vector<StudyPoint::Label>& labels) {
  const std::string plain = absl::StrJoin(labels, "-", [](std::string* out, const StudyPoint::Label& label) {
    absl::StrAppend(out, label.axis, "=", label.value);
  });
  std::string id = plain.substr(0, kLongestId);
  for (char& c : id) {
    if (!absl::ascii_isalnum(c) && !absl::StrContains("=-_.", absl::string_view(&c, 1))) c = '_';
  }
  if (!id.empty() && id.front() == '.') id.front() = '_';
  if (id != plain) absl::StrAppend(&id, "-", Hex64(Hash64(plain)).substr(0, 8));
  return id;
}

// Multiplies the choices by the values of one more axis; `apply` puts a value into a choice.
template <typename Values, typename Apply>
void Multiply(const std::string& axis, const Values& values, const Apply& apply,
              std::vector<Choice>* choices) {
  if (values.empty()) return;
  std::vector<Choice> product;
  for (const Choice& choice : *choices) {
    for (const auto& value : values) {
      Choice& next = product.emplace_back(choice);
      next.labels.push_back({axis, apply(value, &next)});
    }
  }
  *choices = std::move(product);
}

std::vector<Choice> Choices(const StudySpec& spec) {
  std::vector<Choice> choices(1);
  const auto count = [](int64_t Choice::* member) {
    return [member](int64_t value, Choice* choice) {
      choice->*member = value;
      return absl::StrCat(value);
    };
  };
  Multiply("hosts", spec.hosts, count(&Choice::hosts), &choices);
  Multiply("ranks_per_host", spec.ranks_per_host, count(&Choice::ranks_per_host), &choices);
  for (const StudyAxis& axis : spec.axes) {
    int64_t Choice::* mesh = axis.name == "dp"   ? &Choice::dp
                            : axis.name == "cp" ? &Choice::cp
                            : axis.name == "tp" ? &Choice::tp
                                                : nullptr;
    const auto apply = [mesh](const StudyAxis::Value& value, Choice* choice) {
      if (mesh != nullptr) {
        choice->*mesh = std::stoll(value.label);
      } else {
        choice->others.insert(choice->others.end(), value.overrides.begin(), value.overrides.end());
      }
      return value.label;
    };
    Multiply(axis.name, axis.values, apply, &choices);
  }
  return choices;
}

// dp x cp x tp of a point, or why there is none. What no axis says follows from the ranks: cp where dp is an
// axis, else dp.
absl::StatusOr<ParallelSpec> MeshOf(const Choice& choice, const ParallelSpec& base, int64_t ranks) {
  ParallelSpec mesh;
  mesh.tp = choice.tp > 0 ? choice.tp : base.tp;
  const bool cp_follows = choice.dp > 0 && choice.cp == 0;
  mesh.cp = choice.cp > 0 ? choice.cp : base.cp;
  mesh.dp = choice.dp;
  if (cp_follows || choice.dp == 0) {
    const int64_t others = mesh.tp * (cp_follows ? mesh.dp : mesh.cp);
    if (ranks % others != 0) {
      return Invalid(CountText(ranks, "rank"), ": expected a multiple of ",
                     cp_follows ? absl::StrCat("dp ", mesh.dp) : absl::StrCat("cp ", mesh.cp), " x tp ",
                     mesh.tp);
    }
    (cp_follows ? mesh.cp : mesh.dp) = ranks / others;
  }
  const int64_t all = mesh.dp * mesh.cp * mesh.tp;
  if (all == ranks) return mesh;
  return Invalid(CountText(ranks, "rank"), ": expected ", all, " for ", MeshText(mesh.dp, mesh.cp, mesh.tp));
}

// Fills in all but the labels; an error is the reason why the point makes no sense.
absl::Status Plan(const StudySpec& spec, const std::string& run_text, const Choice& choice,
                  PlannedPoint* planned) {
  StudyPoint& point = planned->point;
  point.hosts = choice.hosts;
  point.ranks = choice.hosts * choice.ranks_per_host;
  if (point.ranks > kRanksRange.high)
    return Invalid(point.ranks, " ranks: expected at most ", kRanksRange.high);
  if (!spec.machine.empty()) {
    point.overrides.push_back(absl::StrCat("parallel.exchange.profile=", spec.machine));
  }
  point.overrides.insert(point.overrides.end(), spec.overrides.begin(), spec.overrides.end());
  point.overrides.insert(point.overrides.end(), choice.others.begin(), choice.others.end());
  ANNULUS_ASSIGN_OR_RETURN(const ResolvedConfig base, LoadConfig(spec.run, run_text, point.overrides));
  planned->steps = base.spec.optim.steps;
  planned->steps_between_saves = base.spec.checkpoint.every_steps;

  ANNULUS_ASSIGN_OR_RETURN(const ParallelSpec mesh, MeshOf(choice, base.spec.parallel, point.ranks));
  for (const auto& [name, size] : {std::pair{"dp", mesh.dp}, {"cp", mesh.cp}, {"tp", mesh.tp}}) {
    point.overrides.push_back(absl::StrCat("parallel.", name, "=", size));
  }
  planned->layout = MeshText(mesh.dp, mesh.cp, mesh.tp);
  if (spec.scaling == Scaling::kWeak) {
    const int64_t sequences = base.spec.optim.sequences_per_step * (spec.grow_sequences ? mesh.dp : 1);
    const int64_t seq_len = base.spec.data.seq_len * (spec.grow_seq_len ? mesh.cp : 1);
    point.overrides.push_back(absl::StrCat("optim.sequences_per_step=", sequences));
    point.overrides.push_back(absl::StrCat("data.seq_len=", seq_len));
  }
  std::vector<std::string> overrides = point.overrides;
  for (std::string& override : MeasureOverrides(spec)) overrides.push_back(std::move(override));
  ANNULUS_ASSIGN_OR_RETURN(planned->config, LoadConfig(spec.run, run_text, overrides, point.ranks));
  return absl::OkStatus();
}

// Steps of the whole run and between its saves are of its goodput alone.
bool HasGoodput(const PlannedPoint& planned) {
  const absl::StatusOr<MachineProfile> machine = ProfileOf(planned);
  return machine.ok() && machine->reliability.failure_hours > 0;
}

absl::Status CheckDistinct(const std::vector<PlannedPoint>& points) {
  std::map<std::string, std::string> ids;
  for (const PlannedPoint& planned : points) {
    if (!planned.refused.ok()) continue;
    const std::string run = RunTextOf(planned);
    const std::string whole =
        absl::StrCat(run, " of ", planned.steps, " steps, saves each ", planned.steps_between_saves);
    const auto same = ids.find(whole), same_step = ids.find(run);
    const auto twin = same != ids.end() ? same : same_step;
    if (twin != ids.end() && (twin == same || !HasGoodput(planned))) {
      return Invalid("axes: ", twin->second, " and ", planned.point.id,
                     " are the same run: expected points that differ in more than their labels");
    }
    ids[run] = ids[whole] = planned.point.id;
  }
  return absl::OkStatus();
}

}  // namespace

const char* Name(PointState state) {
  switch (state) {
    case PointState::kOpen:
      return "open";
    case PointState::kDone:
      return "done";
    case PointState::kFailed:
      return "failed";
    case PointState::kRefused:
      return "refused";
  }
  return "";
}

PointResult OpenResult(const PlannedPoint& planned) {
  PointResult result;
  result.point = planned.point;
  result.layout = planned.layout;
  if (planned.refused.ok()) {
    const absl::StatusOr<MachineProfile> machine = ProfileOf(planned);
    if (machine.ok()) result.machine = {machine->device, machine->measured, machine->memory_bytes};
    return result;
  }
  result.state = PointState::kRefused;
  result.reason = absl::StrCat(kRefusedText, std::string(planned.refused.message()));
  return result;
}

absl::StatusOr<StudyResults> OpenResults(const StudySpec& spec, const std::vector<PlannedPoint>& points) {
  StudyResults results{.name = spec.name, .scaling = spec.scaling, .points = {}};
  for (const PlannedPoint& planned : points) results.points.push_back(OpenResult(planned));
  const auto has_machine = [](const PointResult& result) { return !result.machine.device.empty(); };
  if (std::any_of(results.points.begin(), results.points.end(), has_machine)) return results;
  const auto sensible = std::find_if(points.begin(), points.end(),
                                     [](const PlannedPoint& planned) { return planned.refused.ok(); });
  return ProfileOf(*sensible).status();  // StudyGrid gives at least one
}

absl::StatusOr<std::vector<PlannedPoint>> StudyGrid(const StudySpec& spec, const std::string& run_text) {
  std::vector<PlannedPoint> points;
  for (const Choice& choice : Choices(spec)) {
    PlannedPoint& planned = points.emplace_back();
    planned.point.labels = choice.labels;
    planned.point.id = IdOf(choice.labels);
    planned.refused = Plan(spec, run_text, choice, &planned);
  }
  const auto sensible = [](const PlannedPoint& planned) { return planned.refused.ok(); };
  if (std::none_of(points.begin(), points.end(), sensible)) {
    return Invalid(
        "axes: expected at least one point of ", points.size(),
        " that makes sense; the first is refused: ", std::string(points.front().refused.message()));
  }
  ANNULUS_RETURN_IF_ERROR(CheckDistinct(points));
  return points;
}

}  // namespace annulus
