#include "print.h"

#include <google/protobuf/text_format.h>

#include "path.h"

namespace annulus::config {
namespace {

namespace pb = google::protobuf;

void PrintMessage(const pb::Message& message, const std::string& path, const std::string& indent,
                  const Provenance& provenance, std::string* out);

// One set field, or one element of a repeated one (index -1: not repeated).
void PrintField(const pb::Message& message, const pb::FieldDescriptor& field, int index,
                const std::string& parent, const std::string& indent, const Provenance& provenance,
                std::string* out) {
  const pb::Reflection* reflection = message.GetReflection();
  const std::string path = JoinPath(parent, field.name(), index);
  absl::StrAppend(out, indent, field.name());
  if (field.message_type() != nullptr) {
    const pb::Message& child = index < 0 ? reflection->GetMessage(message, &field)
                                         : reflection->GetRepeatedMessage(message, &field, index);
    absl::StrAppend(out, " {\n");
    PrintMessage(child, path, absl::StrCat(indent, "  "), provenance, out);
    absl::StrAppend(out, indent, "}\n");
    return;
  }
  std::string value;
  pb::TextFormat::PrintFieldValueToString(message, &field, index, &value);
  absl::StrAppend(out, ": ", value, "  # ", provenance.SourceOf(path), "\n");
}

void PrintMessage(const pb::Message& message, const std::string& path, const std::string& indent,
                  const Provenance& provenance, std::string* out) {
  const pb::Reflection* reflection = message.GetReflection();
  const pb::Descriptor& type = *message.GetDescriptor();
  for (int i = 0; i < type.field_count(); ++i) {
    const pb::FieldDescriptor& field = *type.field(i);
    if (field.is_repeated()) {
      for (int k = 0; k < reflection->FieldSize(message, &field); ++k) {
        PrintField(message, field, k, path, indent, provenance, out);
      }
    } else if (reflection->HasField(message, &field)) {
      PrintField(message, field, -1, path, indent, provenance, out);
    } else if (const std::string note = provenance.UnsetComment(JoinPath(path, field.name()));
               !note.empty()) {
      absl::StrAppend(out, indent, "# ", note, "\n");
    }
  }
}

bool HasSingleValuesOnly(const pb::Descriptor& type) {
  for (int i = 0; i < type.field_count(); ++i) {
    if (type.field(i)->is_repeated() || type.field(i)->message_type() != nullptr) return false;
  }
  return true;
}

void AppendCompact(const pb::Message& message, const std::string& indent, std::string* out) {
  const pb::Reflection* reflection = message.GetReflection();
  std::vector<const pb::FieldDescriptor*> fields;
  reflection->ListFields(message, &fields);
  for (const pb::FieldDescriptor* field : fields) {
    const int size = field->is_repeated() ? reflection->FieldSize(message, field) : 1;
    for (int i = 0; i < size; ++i) {
      absl::StrAppend(out, indent, field->name());
      if (field->message_type() == nullptr) {
        std::string value;
        pb::TextFormat::PrintFieldValueToString(message, field, field->is_repeated() ? i : -1, &value);
        absl::StrAppend(out, ": ", value, "\n");
        continue;
      }
      const pb::Message& child = field->is_repeated() ? reflection->GetRepeatedMessage(message, field, i)
                                                      : reflection->GetMessage(message, field);
      if (HasSingleValuesOnly(*field->message_type())) {
        absl::StrAppend(out, " { ", child.ShortDebugString(), " }\n");
      } else {
        absl::StrAppend(out, " {\n");
        AppendCompact(child, indent + "  ", out);
        absl::StrAppend(out, indent, "}\n");
      }
    }
  }
}

}  // namespace

std::string PrintCompact(const pb::Message& message) {
  std::string text;
  AppendCompact(message, "", &text);
  return text;
}

std::string PrintResolved(const pb::Message& message, const Provenance& provenance) {
  std::string text = "# The resolved configuration; it loads as it stands.\n";
  PrintMessage(message, "", "", provenance, &text);
  return text;
}

}  // namespace annulus::config
