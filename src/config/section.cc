#include "section.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_join.h"
#include "path.h"

namespace annulus::config {
namespace {

namespace pb = google::protobuf;

constexpr size_t kLongestName = 100;

// Only a closed bound is a valid value itself.
std::string NearestIn(const RealRange& range, double value) {
  const bool too_low = value < range.low;
  const bool too_high = value > range.high;
  if (too_low && range.low_bound == RealRange::Bound::kClosed) {
    return absl::StrCat(" (nearest valid value ", range.low, ")");
  }
  if (too_high && range.high_bound == RealRange::Bound::kClosed) {
    return absl::StrCat(" (nearest valid value ", range.high, ")");
  }
  return "";
}

}  // namespace

std::string Section::PathOf(const std::string& name) const { return JoinPath(path_, name); }

const pb::FieldDescriptor* Section::Field(const std::string& name) const {
  const pb::FieldDescriptor* field = message_->GetDescriptor()->FindFieldByName(name);
  ANNULUS_CHECK(field != nullptr) << "no field " << PathOf(name) << " in the schema";
  return field;
}

bool Section::Has(const std::string& name) const {
  return message_->GetReflection()->HasField(*message_, Field(name));
}

Section Section::Child(const std::string& name) const {
  return Section(message_->GetReflection()->MutableMessage(message_, Field(name)), PathOf(name), provenance_);
}

std::optional<Section> Section::RequiredChild(const std::string& name) const {
  if (Has(name)) return Child(name);
  const std::string fields = absl::StrJoin(FieldNames(*Field(name)->message_type()), ", ");
  provenance_->Missing(PathOf(name), absl::StrCat(name, " { ... } with ", fields));
  return std::nullopt;
}

std::vector<Section> Section::Children(const std::string& name) const {
  const pb::Reflection* reflection = message_->GetReflection();
  std::vector<Section> children;
  for (int i = 0; i < reflection->FieldSize(*message_, Field(name)); ++i) {
    children.emplace_back(reflection->MutableRepeatedMessage(message_, Field(name), i),
                          JoinPath(path_, name, i), provenance_);
  }
  return children;
}

std::string Section::Chosen(const std::string& oneof) const {
  const pb::OneofDescriptor* group = message_->GetDescriptor()->FindOneofByName(oneof);
  ANNULUS_CHECK(group != nullptr) << "no oneof " << PathOf(oneof) << " in the schema";
  const auto* field = message_->GetReflection()->GetOneofFieldDescriptor(*message_, group);
  return field == nullptr ? "" : field->name();
}

bool Section::Given(const std::string& name, Presence presence, const std::string& expected) const {
  if (Has(name)) return true;
  if (presence == Presence::kRequired) {
    provenance_->Missing(PathOf(name), expected);
  } else {
    provenance_->MarkFilled(PathOf(name), "default");
  }
  return false;
}

void Section::Int(const std::string& name, Presence presence, const IntRange& range, int64_t* value) const {
  const pb::FieldDescriptor* field = Field(name);
  const pb::Reflection* reflection = message_->GetReflection();
  if (!Given(name, presence, Describe(range))) {
    if (presence == Presence::kOptional) reflection->SetInt64(message_, field, *value);
    return;
  }
  const int64_t given = reflection->GetInt64(*message_, field);
  if (!range.Contains(given)) {
    const int64_t nearest = given < range.low ? range.low : range.high;
    provenance_->Refuse(PathOf(name), absl::StrCat(given),
                        absl::StrCat("expected ", Describe(range), " (nearest valid value ", nearest, ")"));
    return;
  }
  *value = given;
}

void Section::Seed(const std::string& name, uint64_t* value) const {
  const pb::Reflection* reflection = message_->GetReflection();
  if (Given(name, Presence::kOptional, "")) {
    *value = reflection->GetUInt64(*message_, Field(name));
  } else {
    reflection->SetUInt64(message_, Field(name), *value);
  }
}

void Section::Real(const std::string& name, Presence presence, const RealRange& range, double* value) const {
  const pb::FieldDescriptor* field = Field(name);
  const pb::Reflection* reflection = message_->GetReflection();
  if (!Given(name, presence, Describe(range))) {
    if (presence == Presence::kOptional) reflection->SetDouble(message_, field, *value);
    return;
  }
  const double given = reflection->GetDouble(*message_, field);
  if (!range.Contains(given)) {
    provenance_->Refuse(PathOf(name), absl::StrCat(given),
                        absl::StrCat("expected ", Describe(range), NearestIn(range, given)));
    return;
  }
  *value = given;
}

void Section::Bool(const std::string& name, bool* value) const {
  const pb::Reflection* reflection = message_->GetReflection();
  if (Given(name, Presence::kOptional, "")) {
    *value = reflection->GetBool(*message_, Field(name));
  } else {
    reflection->SetBool(message_, Field(name), *value);
  }
}

void Section::String(const std::string& name, Presence presence, std::string* value) const {
  const pb::FieldDescriptor* field = Field(name);
  const pb::Reflection* reflection = message_->GetReflection();
  if (!Given(name, presence, "a text in quotes")) {
    if (presence == Presence::kOptional) reflection->SetString(message_, field, *value);
    return;
  }
  std::string given = reflection->GetString(*message_, field);
  if (presence == Presence::kRequired && given.empty()) {
    provenance_->Refuse(PathOf(name), "\"\"", "expected a text that is not empty");
    return;
  }
  *value = std::move(given);
}

void Section::Path(const std::string& name, Presence presence, std::string* path) const {
  String(name, presence, path);
  const bool empty = presence == Presence::kOptional && path->empty();  // String refuses a required one
  if (!empty && !absl::StrContains(*path, absl::string_view("\0", 1))) return;
  provenance_->Refuse(PathOf(name), absl::StrCat("\"", Printable(*path), "\""),
                      "expected a path that is not empty and holds no zero byte");
}

void Section::FileName(const std::string& name, std::string* value) const {
  String(name, Presence::kRequired, value);
  const auto allowed = [](char c) { return absl::ascii_isalnum(c) || c == '-' || c == '_' || c == '.'; };
  const bool fits = value->size() <= kLongestName && std::all_of(value->begin(), value->end(), allowed);
  if (value->empty() || (fits && value->front() != '.')) return;
  provenance_->Refuse(PathOf(name), absl::StrCat("\"", Printable(*value), "\""),
                      absl::StrCat("expected at most ", kLongestName,
                                   " letters, digits, '-', '_' or '.', not beginning with '.'"));
}

std::string Section::EnumName(const std::string& name, Presence presence, const std::string& fallback) const {
  const pb::FieldDescriptor* field = Field(name);
  const pb::Reflection* reflection = message_->GetReflection();
  if (!Given(name, presence, absl::StrCat("one of ", absl::StrJoin(ValueNames(*field->enum_type()), ", ")))) {
    const pb::EnumValueDescriptor* value = field->enum_type()->FindValueByName(fallback);
    if (presence == Presence::kOptional) reflection->SetEnum(message_, field, value);
    return fallback;
  }
  // The parser takes any number for an enum of proto3.
  const int number = reflection->GetEnumValue(*message_, field);
  const auto* value = field->enum_type()->FindValueByNumber(number);
  if (value == nullptr) {
    provenance_->Refuse(PathOf(name), absl::StrCat(number), NoSuchValue(*field->enum_type(), ""));
    return fallback;
  }
  return value->name();
}

void Section::Derive(const std::string& name, int64_t value, const std::string& how) const {
  message_->GetReflection()->SetInt64(message_, Field(name), value);
  provenance_->MarkFilled(PathOf(name), absl::StrCat("derived: ", how));
}

}  // namespace annulus::config
