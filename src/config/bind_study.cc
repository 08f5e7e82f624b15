#include "bind_study.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/strip.h"
#include "path.h"
#include "section.h"

namespace annulus::config {
namespace {

constexpr IntRange kHosts{1, 1 << 16};
constexpr IntRange kSteps{1, int64_t{1} << 32};
constexpr IntRange kWarmUp{0, 1 << 20};
constexpr IntRange kRepeats{1, 1000};
constexpr RealRange kMinutes{0.0, 1e6, RealRange::Bound::kOpen};
constexpr RealRange kJitter{0.0, 10.0};
constexpr RealRange kShare{0.0, 1.0};
constexpr RealRange kSlowdown{1.0, 1e6};
constexpr int64_t kMostPoints = 10000;

// Descends to the field that the path of an override names, without looking at indices. "" or what is wrong.
std::string PathFault(absl::string_view path) {
  const auto steps = ParsePath(path);
  if (!steps.ok()) return std::string(steps.status().message());
  const google::protobuf::Descriptor* type = Run::descriptor();
  for (const PathStep& step : *steps) {
    if (type == nullptr) return absl::StrCat("`", step.name, "`: no field of a single value");
    const auto* field = type->FindFieldByName(step.name);
    if (field == nullptr)
      return absl::StrCat("`", Printable(step.name), "`: ", NoSuchField(*type, step.name));
    type = field->message_type();
  }
  return "";
}

// The elements of a repeated string that are overrides.
template <typename Strings>
std::vector<std::string> BindOverrides(const Section& section, const Strings& set) {
  std::vector<std::string> overrides;
  for (int i = 0; i < set.size(); ++i) {
    const size_t equals = set[i].find('=');
    const std::string fault = equals == std::string::npos
                                  ? "expected path=value, such as optim.micro_batch=2"
                                  : PathFault(absl::string_view(set[i]).substr(0, equals));
    if (!fault.empty()) {
      section.provenance()->Refuse(JoinPath(section.path(), "set", i),
                                   absl::StrCat("\"", Printable(set[i]), "\""), fault);
    }
    overrides.push_back(set[i]);
  }
  return overrides;
}

// Labels name folders: each once.
void CheckDistinct(const Section& section, const std::string& name, const std::vector<std::string>& labels) {
  std::set<std::string> seen;
  for (size_t i = 0; i < labels.size(); ++i) {
    if (seen.insert(labels[i]).second) continue;
    section.provenance()->Refuse(JoinPath(section.path(), name, static_cast<int>(i)), Printable(labels[i]),
                                 "expected each value once");
  }
}

std::vector<int64_t> BindCounts(const Section& axes, const std::string& name,
                                const google::protobuf::RepeatedField<int64_t>& list, const IntRange& range) {
  std::vector<int64_t> values(list.begin(), list.end());
  std::vector<std::string> labels;
  for (int i = 0; i < list.size(); ++i) {
    labels.push_back(absl::StrCat(list[i]));
    if (range.Contains(list[i])) continue;
    axes.provenance()->Refuse(JoinPath(axes.path(), name, i), labels.back(),
                              absl::StrCat("expected ", Describe(range)));
  }
  CheckDistinct(axes, name, labels);
  return values;
}

void AddAxis(StudyAxis axis, StudySpec* spec) {
  if (!axis.values.empty()) spec->axes.push_back(std::move(axis));
}

void BindCountAxis(const Section& axes, const std::string& name,
                   const google::protobuf::RepeatedField<int64_t>& list, const IntRange& range,
                   const std::string& run_path, StudySpec* spec) {
  StudyAxis axis{.name = name, .values = {}};
  for (const int64_t value : BindCounts(axes, name, list, range)) {
    axis.values.push_back({absl::StrCat(value), {absl::StrCat(run_path, "=", value)}});
  }
  AddAxis(std::move(axis), spec);
}

void BindEnumAxis(const Section& axes, const std::string& name,
                  const google::protobuf::RepeatedField<int>& list,
                  const google::protobuf::EnumDescriptor& type, const std::string& run_path,
                  StudySpec* spec) {
  StudyAxis axis{.name = name, .values = {}};
  std::vector<std::string> labels;
  for (int i = 0; i < list.size(); ++i) {
    const auto* value = type.FindValueByNumber(list[i]);
    if (value == nullptr) {
      axes.provenance()->Refuse(JoinPath(axes.path(), name, i), absl::StrCat(list[i]), NoSuchValue(type, ""));
      continue;
    }
    labels.push_back(value->name());
    axis.values.push_back({value->name(), {absl::StrCat(run_path, "=", value->name())}});
  }
  CheckDistinct(axes, name, labels);
  AddAxis(std::move(axis), spec);
}

void BindModels(const Section& axes, Study::Axes* message, StudySpec* spec) {
  StudyAxis axis{.name = "model", .values = {}};
  std::vector<std::string> labels;
  const std::vector<Section> models = axes.Children("model");
  for (size_t i = 0; i < models.size(); ++i) {
    StudyAxis::Value& value = axis.values.emplace_back();
    models[i].String("label", Presence::kRequired, &value.label);
    value.overrides = BindOverrides(models[i], message->model(static_cast<int>(i)).set());
    labels.push_back(value.label);
  }
  CheckDistinct(axes, "model", labels);
  AddAxis(std::move(axis), spec);
}

void BindFields(const Section& axes, Study::Axes* message, StudySpec* spec) {
  const std::vector<Section> fields = axes.Children("field");
  for (size_t i = 0; i < fields.size(); ++i) {
    const Study::Field& field = message->field(static_cast<int>(i));
    StudyAxis axis;
    fields[i].String("path", Presence::kRequired, &axis.name);
    const std::string fault = axis.name.empty() ? "" : PathFault(axis.name);
    if (!fault.empty()) {
      axes.provenance()->Refuse(fields[i].PathOf("path"), absl::StrCat("\"", Printable(axis.name), "\""),
                                fault);
    }
    if (field.value().empty()) {
      axes.provenance()->Missing(fields[i].PathOf("value"), "at least one value in quotes");
    }
    for (const std::string& value : field.value()) {
      axis.values.push_back({value, {absl::StrCat(axis.name, "=", value)}});
    }
    CheckDistinct(fields[i], "value", {field.value().begin(), field.value().end()});
    AddAxis(std::move(axis), spec);
  }
}

// What sets fields of the run.
struct Setter {
  std::string name;             // of an axis; empty: none
  std::set<std::string> paths;  // of the fields
  std::string why;              // no axis before it may set them
};

std::set<std::string> PathsOf(const std::vector<std::string>& overrides) {
  std::set<std::string> paths;
  for (const std::string& override : overrides) paths.insert(override.substr(0, override.find('=')));
  return paths;
}

// In the order in which a point gets them, so that each wins over those before: axes, those of the mesh last;
// what follows from the ranks where no axis says it (StudyGrid); what makes a measured run short.
std::vector<Setter> SettersOf(const StudySpec& spec) {
  std::vector<Setter> setters, mesh;
  std::set<std::string> given;
  for (const StudyAxis& axis : spec.axes) {
    const bool of_mesh = axis.name == "dp" || axis.name == "cp" || axis.name == "tp";
    if (of_mesh) given.insert(axis.name);
    Setter& setter = (of_mesh ? mesh : setters).emplace_back();
    setter.name = axis.name;
    setter.why = absl::StrCat("the axis ", axis.name, " sets it too");
    for (const StudyAxis::Value& value : axis.values) setter.paths.merge(PathsOf(value.overrides));
  }
  setters.insert(setters.end(), mesh.begin(), mesh.end());
  const std::string follows = given.count("dp") == 0 ? "dp" : given.count("cp") == 0 ? "cp" : "";
  if (!follows.empty()) {
    setters.push_back({.name = "",
                       .paths = {"parallel." + follows},
                       .why = absl::StrCat("it follows from the ranks, or is given by the axis ", follows)});
  }
  setters.push_back({.name = "",
                     .paths = PathsOf(MeasureOverrides(spec)),
                     .why = "it is the same in all runs that are measured"});
  // Goodput goes by it.
  setters.back().paths.erase("checkpoint.every_steps");
  return setters;
}

// Whether it is the field at `other`, or in it.
bool IsIn(absl::string_view path, absl::string_view other) {
  return absl::ConsumePrefix(&path, other) && (path.empty() || path[0] == '.' || path[0] == '[');
}

// Else points with other labels would be the same run.
void CheckSetOnce(const Section& axes, const StudySpec& spec) {
  const std::vector<Setter> setters = SettersOf(spec);
  for (size_t i = 0; i < setters.size(); ++i) {
    for (size_t later = i + 1; later < setters.size(); ++later) {
      const std::string& name = setters[i].name;
      if (name.empty() || name == setters[later].name) continue;  // refused on its own
      for (const std::string& path : setters[i].paths) {
        const bool set_again = std::any_of(setters[later].paths.begin(), setters[later].paths.end(),
                                           [&](const std::string& other) { return IsIn(path, other); });
        if (!set_again) continue;
        axes.provenance()->Refuse(
            axes.path(), absl::StrCat("{ ... ", Printable(name), " ... }"),
            absl::StrCat("expected no axis that sets ", Printable(path), ": ", setters[later].why));
      }
    }
  }
}

void BindAxes(const Section& axes, Study::Axes* message, StudySpec* spec) {
  spec->hosts = BindCounts(axes, "hosts", message->hosts(), kHosts);
  spec->ranks_per_host = BindCounts(axes, "ranks_per_host", message->ranks_per_host(), kHosts);
  if (spec->ranks_per_host.empty()) {
    axes.provenance()->Missing(axes.PathOf("ranks_per_host"),
                               "at least one number of ranks, such as [1, 2, 4]");
  }
  BindCountAxis(axes, "dp", message->dp(), kRanksRange, "parallel.dp", spec);
  BindCountAxis(axes, "cp", message->cp(), kRanksRange, "parallel.cp", spec);
  BindCountAxis(axes, "tp", message->tp(), kRanksRange, "parallel.tp", spec);
  BindCountAxis(axes, "seq_len", message->seq_len(), kLengthRange, "data.seq_len", spec);
  BindEnumAxis(axes, "plan", message->plan(), *Exchange::Plan_descriptor(), "parallel.exchange.plan", spec);
  BindEnumAxis(axes, "transport", message->transport(), *Exchange::Transport_descriptor(),
               "parallel.exchange.transport", spec);
  BindModels(axes, message, spec);
  BindFields(axes, message, spec);
  std::set<std::string> names;
  int64_t points = static_cast<int64_t>(std::max<size_t>(1, spec->hosts.size()) *
                                        std::max<size_t>(1, spec->ranks_per_host.size()));
  for (const StudyAxis& axis : spec->axes) {
    points = std::min<int64_t>(points * static_cast<int64_t>(axis.values.size()), kMostPoints + 1);
    if (names.insert(axis.name).second) continue;
    axes.provenance()->Refuse(axes.path(), absl::StrCat("{ ... ", Printable(axis.name), " ... }"),
                              "expected each axis once");
  }
  CheckSetOnce(axes, *spec);
  if (points > kMostPoints) {
    axes.provenance()->Refuse(
        axes.path(), "{ ... }",
        absl::StrCat("expected at most ", kMostPoints, " points, the product of all axes"));
  }
}

void BindScaling(const Section& root, const Study& study, StudySpec* spec) {
  root.Enum<Scaling>("scaling", {{"STRONG", Scaling::kStrong}, {"WEAK", Scaling::kWeak}}, &spec->scaling);
  for (int i = 0; i < study.grows_size(); ++i) {
    const int grows = study.grows(i);
    const std::string path = JoinPath(root.path(), "grows", i);
    if (!Study::Grows_IsValid(grows)) {
      root.provenance()->Refuse(path, absl::StrCat(grows), NoSuchValue(*Study::Grows_descriptor(), ""));
    } else if (spec->scaling == Scaling::kStrong) {
      root.provenance()->Refuse(path, Study::Grows_Name(study.grows(i)), "expected scaling: WEAK with it");
    }
    (grows == Study::SEQ_LEN ? spec->grow_seq_len : spec->grow_sequences) = true;
  }
  if (spec->scaling == Scaling::kWeak && study.grows_size() == 0) {
    root.provenance()->Missing("grows", "SEQUENCES_PER_STEP (with dp), SEQ_LEN (with cp) or both");
  }
}

// The printed study stands elsewhere, where a relative path would lead astray.
void BindPath(const Section& root, const std::string& name, Presence presence, const std::string& folder,
              std::string* value, std::string* in_message) {
  root.Path(name, presence, value);
  if (value->empty()) return;
  std::error_code ignored;
  *value =
      std::filesystem::absolute(std::filesystem::path(folder) / *value, ignored).lexically_normal().string();
  *in_message = *value;
}

}  // namespace

StudySpec BindStudy(const std::string& folder, Study* study, Provenance* provenance) {
  StudySpec spec;
  const Section root(study, "", provenance);
  root.FileName("name", &spec.name);
  BindPath(root, "run", Presence::kRequired, folder, &spec.run, study->mutable_run());
  spec.overrides = BindOverrides(root, study->set());
  if (study->has_machine()) {
    BindPath(root, "machine", Presence::kRequired, folder, &spec.machine, study->mutable_machine());
  }
  BindScaling(root, *study, &spec);
  const Section measure = root.Child("measure");
  measure.Int("steps", Presence::kOptional, kSteps, &spec.steps);
  measure.Int("warm_up", Presence::kOptional, kWarmUp, &spec.warm_up);
  measure.Int("repeats", Presence::kOptional, kRepeats, &spec.repeats);
  measure.Real("limit_minutes", Presence::kOptional, kMinutes, &spec.limit_minutes);
  const Section disturbance = root.Child("disturbance");
  disturbance.Seed("seed", &spec.seed);
  disturbance.Real("jitter", Presence::kOptional, kJitter, &spec.jitter);
  disturbance.Real("straggler_share", Presence::kOptional, kShare, &spec.straggler_share);
  disturbance.Real("straggler_slowdown", Presence::kOptional, kSlowdown, &spec.straggler_slowdown);
  if (study->has_goodput_steps()) {
    root.Int("goodput_steps", Presence::kRequired, kSteps, &spec.goodput_steps);
  }
  if (const auto axes = root.RequiredChild("axes")) BindAxes(*axes, study->mutable_axes(), &spec);
  return spec;
}

}  // namespace annulus::config
