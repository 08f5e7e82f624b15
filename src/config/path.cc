#include "path.h"

#include <optional>

#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "annulus.pb.h"
#include "suggest.h"

namespace annulus::config {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;

// Path of the first field called `name` at or below `type`. The schema has no recursive message.
std::optional<std::string> FindElsewhere(const Descriptor& type, absl::string_view name,
                                         const std::string& path) {
  for (int i = 0; i < type.field_count(); ++i) {
    const FieldDescriptor& field = *type.field(i);
    const std::string here = JoinPath(path, field.name());
    if (field.name() == std::string(name)) return here;
    if (field.message_type() == nullptr) continue;
    if (auto found = FindElsewhere(*field.message_type(), name, here)) return found;
  }
  return std::nullopt;
}

}  // namespace

absl::StatusOr<std::vector<PathStep>> ParsePath(absl::string_view path) {
  std::vector<PathStep> steps;
  for (absl::string_view part : absl::StrSplit(path, '.')) {
    PathStep step;
    const size_t bracket = part.find('[');
    step.name = std::string(part.substr(0, bracket));
    if (step.name.empty()) return Invalid("expected a path such as optim.adamw.lr or data.train[0].weight");
    if (bracket != absl::string_view::npos) {
      absl::string_view index = part.substr(bracket + 1);
      const bool closed = !index.empty() && index.back() == ']';
      if (closed) index.remove_suffix(1);
      if (!closed || !absl::SimpleAtoi(index, &step.index) || step.index < 0) {
        return Invalid("expected an index such as ", step.name, "[0]");
      }
    }
    steps.push_back(std::move(step));
  }
  return steps;
}

std::string JoinPath(absl::string_view parent, absl::string_view name, int index) {
  std::string path = parent.empty() ? std::string(name) : absl::StrCat(parent, ".", name);
  if (index >= 0) absl::StrAppend(&path, "[", index, "]");
  return path;
}

std::vector<std::string> FieldNames(const Descriptor& type) {
  std::vector<std::string> names;
  for (int i = 0; i < type.field_count(); ++i) names.push_back(type.field(i)->name());
  return names;
}

std::vector<std::string> ValueNames(const google::protobuf::EnumDescriptor& type) {
  std::vector<std::string> names;
  for (int i = 0; i < type.value_count(); ++i) names.push_back(type.value(i)->name());
  return names;
}

std::string NoSuchField(const Descriptor& type, absl::string_view name) {
  std::optional<std::string> meant = Nearest(name, FieldNames(type));
  const bool of_a_run = type.file() == Run::descriptor()->file();
  if (!meant && of_a_run) meant = FindElsewhere(*Run::descriptor(), name, "");
  if (meant) return absl::StrCat("no such field; did you mean `", *meant, "`?");
  return absl::StrCat("no such field; expected one of ", absl::StrJoin(FieldNames(type), ", "));
}

std::string NoSuchValue(const google::protobuf::EnumDescriptor& type, absl::string_view name) {
  const std::vector<std::string> names = ValueNames(type);
  std::string text = absl::StrCat("expected ", names.size() > 1 ? "one of " : "", absl::StrJoin(names, ", "));
  if (const auto meant = Nearest(name, names)) absl::StrAppend(&text, " (did you mean `", *meant, "`?)");
  return text;
}

}  // namespace annulus::config
