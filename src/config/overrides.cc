#include "overrides.h"

#include "absl/strings/ascii.h"
#include "absl/strings/str_join.h"
#include "parse.h"
#include "path.h"

namespace annulus::config {
namespace {

namespace pb = google::protobuf;

struct Target {
  pb::Message* message;  // holds the field, or is the element itself if `index` is given
  const pb::FieldDescriptor* field;
  bool is_element = false;
};

absl::Status CheckIndex(const pb::Message& message, const pb::FieldDescriptor& field, const PathStep& step) {
  if (!field.is_repeated()) {
    if (step.index < 0) return absl::OkStatus();
    return Invalid(step.name, " is not repeated; expected it without [", step.index, "]");
  }
  const int size = message.GetReflection()->FieldSize(message, &field);
  if (step.index < 0) return Invalid(step.name, " is repeated; expected an index such as ", step.name, "[0]");
  if (step.index > size) {
    return Invalid("expected an index from 0 to ", size, " (", size, " given so far; ", size,
                   " appends one)");
  }
  return absl::OkStatus();
}

// Walks to the field that the path names, making the messages on the way.
absl::StatusOr<Target> Find(const std::vector<PathStep>& steps, pb::Message* message) {
  for (size_t i = 0;; ++i) {
    const PathStep& step = steps[i];
    const pb::FieldDescriptor* field = message->GetDescriptor()->FindFieldByName(step.name);
    if (field == nullptr) {
      return Invalid("`", Printable(step.name), "`: ", NoSuchField(*message->GetDescriptor(), step.name));
    }
    ANNULUS_RETURN_IF_ERROR(CheckIndex(*message, *field, step));
    const bool last = i + 1 == steps.size();
    if (!last && field->message_type() == nullptr) {
      return Invalid(step.name, " is a single value and has no field `", Printable(steps[i + 1].name), "`");
    }
    const pb::Reflection* reflection = message->GetReflection();
    if (field->is_repeated()) {
      const bool append = step.index == reflection->FieldSize(*message, field);
      message = append ? reflection->AddMessage(message, field)
                       : reflection->MutableRepeatedMessage(message, field, step.index);
      if (last) return Target{message, field, true};
    } else if (last) {
      return Target{message, field};
    } else {
      message = reflection->MutableMessage(message, field);
    }
  }
}

std::string Expected(const pb::FieldDescriptor& field, absl::string_view value) {
  switch (field.cpp_type()) {
    case pb::FieldDescriptor::CPPTYPE_DOUBLE:
      return "expected a number";
    case pb::FieldDescriptor::CPPTYPE_BOOL:
      return "expected true or false";
    case pb::FieldDescriptor::CPPTYPE_UINT64:
      return "expected an integer from 0 to 18446744073709551615";
    case pb::FieldDescriptor::CPPTYPE_ENUM:
      return NoSuchValue(*field.enum_type(), value);
    default:
      return "expected an integer";
  }
}

absl::Status SetMessage(const std::string& path, absl::string_view value, pb::Message* message) {
  if (value.size() < 2 || value.front() != '{' || value.back() != '}') {
    return Invalid("expected a field of it (", absl::StrJoin(FieldNames(*message->GetDescriptor()), ", "),
                   ") or a message in braces {...}");
  }
  message->Clear();
  const std::string inner(value.substr(1, value.size() - 2));
  const std::vector<SyntaxError> errors = ParseMessage(inner, path, message, nullptr);
  if (errors.empty()) return absl::OkStatus();
  return Invalid(errors.front().message);
}

absl::Status SetValue(const std::string& path, absl::string_view value, const Target& target) {
  pb::Message* message = target.message;
  const pb::FieldDescriptor* field = target.field;
  const pb::Reflection* reflection = message->GetReflection();
  if (target.is_element) return SetMessage(path, value, message);
  if (field->message_type() != nullptr) {
    return SetMessage(path, value, reflection->MutableMessage(message, field));
  }
  if (field->cpp_type() == pb::FieldDescriptor::CPPTYPE_STRING) {
    reflection->SetString(message, field, std::string(value));
    return absl::OkStatus();
  }
  const std::string text(absl::StripAsciiWhitespace(value));
  if (field->enum_type() != nullptr) {
    const pb::EnumValueDescriptor* named = field->enum_type()->FindValueByName(text);
    if (named == nullptr) return Invalid(Expected(*field, text));
    reflection->SetEnum(message, field, named);
    return absl::OkStatus();
  }
  if (!ParseScalar(text, *field, message)) return Invalid(Expected(*field, text));
  return absl::OkStatus();
}

}  // namespace

void ApplyOverride(const std::string& as_typed, Run* run, Provenance* provenance) {
  const size_t equals = as_typed.find('=');
  if (equals == std::string::npos) {
    provenance->OverrideError(as_typed, "expected path=value, such as optim.adamw.lr=3e-4");
    return;
  }
  const absl::string_view value = absl::string_view(as_typed).substr(equals + 1);
  const auto steps = ParsePath(absl::string_view(as_typed).substr(0, equals));
  if (!steps.ok()) return provenance->OverrideError(as_typed, steps.status().message());
  std::string path;  // as everywhere else, whatever way the index was typed
  for (const PathStep& step : *steps) path = JoinPath(path, step.name, step.index);
  Run changed = *run;  // a refused override leaves nothing half done
  const auto target = Find(*steps, &changed);
  const absl::Status status = target.ok() ? SetValue(path, value, *target) : target.status();
  if (!status.ok()) return provenance->OverrideError(as_typed, status.message());
  run->Swap(&changed);
  provenance->MarkOverride(path, as_typed);
}

}  // namespace annulus::config
