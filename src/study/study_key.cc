#include "study_key.h"

#include "absl/strings/str_split.h"
#include "annulus/base/hash.h"

namespace annulus {
namespace {

// A resolved configuration without the comments that say where values come from.
std::string WithoutSources(const std::string& text) {
  std::string plain;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    absl::StrAppend(&plain, line.substr(0, line.rfind("  # ")), "\n");
  }
  return plain;
}

}  // namespace

std::string KeyOf(const std::string& text) { return Hex64(Hash64(text)); }

std::string RunTextOf(const PlannedPoint& planned) {
  return absl::StrCat(WithoutSources(planned.config.text), planned.point.ranks, " ranks on ",
                      planned.point.hosts, " hosts");
}

std::string MeasurementKey(const StudySpec& spec, const std::string& runs) {
  return KeyOf(absl::StrCat(runs, " warm_up ", spec.warm_up, " repeats ", spec.repeats));
}

std::string PredictionKey(const StudySpec& spec, const PlannedPoint& planned, const std::string& runs,
                          const std::string& inputs) {
  return KeyOf(absl::StrCat(runs, " steps ", planned.steps, " or ", spec.goodput_steps, " saves ",
                            planned.steps_between_saves, " seed ", spec.seed, " jitter ", spec.jitter,
                            " stragglers ", spec.straggler_share, " by ", spec.straggler_slowdown, inputs));
}

}  // namespace annulus
