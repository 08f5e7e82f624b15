#include "provenance.h"

#include "absl/strings/escaping.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "path.h"

namespace annulus::config {
namespace {

constexpr size_t kMostErrors = 50;
constexpr size_t kLongestText = 200;

// "a.b[0]" -> "a.b" -> "a" -> "".
std::string Parent(const std::string& path) {
  if (!path.empty() && path.back() == ']') return path.substr(0, path.rfind('['));
  const size_t dot = path.rfind('.');
  return dot == std::string::npos ? "" : path.substr(0, dot);
}

}  // namespace

std::string Printable(absl::string_view text) {
  if (text.size() <= kLongestText) return absl::CEscape(text);
  return absl::StrCat(absl::CEscape(text.substr(0, kLongestText)), "...");
}

Provenance::Provenance(absl::string_view file, const google::protobuf::Descriptor* type)
    : file_(Printable(file)), type_(type) {}

void Provenance::MarkOverride(absl::string_view path, absl::string_view as_typed) {
  overrides_[std::string(path)] = absl::StrCat("--set ", Printable(as_typed));
}

void Provenance::MarkFilled(absl::string_view path, absl::string_view source) {
  filled_[std::string(path)] = std::string(source);
}

void Provenance::MarkUnset(absl::string_view path, absl::string_view comment) {
  unset_[std::string(path)] = std::string(comment);
}

std::string Provenance::UnsetComment(const std::string& path) const {
  const auto found = unset_.find(path);
  return found == unset_.end() ? "" : found->second;
}

const std::pair<const std::string, std::string>* Provenance::OverrideOf(std::string path) const {
  for (; !path.empty(); path = Parent(path)) {
    const auto found = overrides_.find(path);
    if (found != overrides_.end()) return &*found;
  }
  return nullptr;
}

std::pair<int, int> Provenance::PositionOf(const std::string& path) const {
  std::pair<int, int> position = {1, 1};
  const auto steps = ParsePath(path);
  if (!steps.ok()) return position;
  const google::protobuf::Descriptor* type = type_;
  const google::protobuf::TextFormat::ParseInfoTree* tree = &tree_;
  for (const PathStep& step : *steps) {
    const auto* field = type == nullptr ? nullptr : type->FindFieldByName(step.name);
    // The tree takes -1 for a singular field and an index for a repeated one, and aborts otherwise.
    if (field == nullptr || field->is_repeated() != (step.index >= 0)) break;
    auto location = tree->GetLocation(field, step.index);
    // A list in brackets has one place.
    if (location.line < 0 && step.index > 0) location = tree->GetLocation(field, 0);
    if (location.line < 0) break;
    position = {location.line + 1, location.column + 1};
    type = field->message_type();
    tree = type == nullptr ? nullptr : tree->GetTreeForNested(field, step.index);
    if (tree == nullptr) break;
  }
  return position;
}

std::string Provenance::SourceOf(const std::string& path) const {
  const auto filled = filled_.find(path);
  if (filled != filled_.end()) return filled->second;
  if (OverrideOf(path) != nullptr) return "--set";
  return absl::StrCat(file_, ":", PositionOf(path).first);
}

Provenance::Place Provenance::Locate(const std::string& path) const {
  if (const auto* override = OverrideOf(path)) return {override->second, override->first == path};
  const auto [line, column] = PositionOf(path);
  return {absl::StrCat(file_, ":", line, ":", column), false};
}

void Provenance::Refuse(const std::string& path, absl::string_view value, absl::string_view expected) {
  refused_.insert(path);
  const Place place = Locate(path);
  const std::string what = place.is_override_of_it ? "" : absl::StrCat(path, "=", value, ": ");
  errors_.push_back(absl::StrCat(place.text, ": ", what, expected));
}

void Provenance::Missing(const std::string& path, absl::string_view expected) {
  refused_.insert(path);
  const bool is_element = !path.empty() && path.back() == ']';
  const Place place = Locate(is_element ? path : Parent(path));
  errors_.push_back(absl::StrCat(place.text, ": ", path, ": missing; expected ", expected));
}

void Provenance::Finding(absl::string_view line) {
  const std::pair<absl::string_view, absl::string_view> halves =
      absl::StrSplit(line, absl::MaxSplits(": ", 1));
  const std::pair<std::string, std::string> field = absl::StrSplit(halves.first, absl::MaxSplits('=', 1));
  for (std::string path = field.first; !path.empty(); path = Parent(path)) {
    if (refused_.count(path) > 0) return;
  }
  Refuse(field.first, field.second, halves.second);
}

void Provenance::ErrorAt(int line, int column, absl::string_view message) {
  errors_.push_back(absl::StrCat(file_, ":", line, ":", column, ": ", message));
}

void Provenance::OverrideError(absl::string_view as_typed, absl::string_view message) {
  errors_.push_back(absl::StrCat("--set ", Printable(as_typed), ": ", message));
}

absl::Status Provenance::status() const {
  if (errors_.empty()) return absl::OkStatus();
  if (errors_.size() <= kMostErrors) return Invalid(absl::StrJoin(errors_, "\n"));
  const std::vector<std::string> first(errors_.begin(), errors_.begin() + kMostErrors);
  return Invalid(absl::StrJoin(first, "\n"), "\n", errors_.size() - kMostErrors, " more errors");
}

}  // namespace annulus::config
