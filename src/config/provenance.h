#pragma once

// Where every value of a configuration came from, and the errors found in it, each placed there.

#include <google/protobuf/text_format.h>

#include <map>
#include <set>
#include <string>
#include <vector>

#include "annulus/base/status.h"

namespace annulus::config {

class Provenance {
 public:
  // `file` names the text, a message of `type`, in messages; it is made printable.
  Provenance(absl::string_view file, const google::protobuf::Descriptor* type);

  google::protobuf::TextFormat::ParseInfoTree* tree() { return &tree_; }

  void MarkOverride(absl::string_view path, absl::string_view as_typed);
  // A value that the text does not give: `source` is "default" or "derived: how".
  void MarkFilled(absl::string_view path, absl::string_view source);

  // For the resolved text: "tiny.textproto:3", "--set", "default", "derived: ...".
  std::string SourceOf(const std::string& path) const;
  // The value of a field that stays unset, shown as a comment in the resolved text. "" if there is none.
  void MarkUnset(absl::string_view path, absl::string_view comment);
  std::string UnsetComment(const std::string& path) const;

  // Errors. A refused value reads "file:3:5: optim.adamw.lr=-1: expected ...", placed at the field or, if it
  // is not in the text, at the nearest message around it; after an override "--set optim.adamw.lr=-1: ...".
  void Refuse(const std::string& path, absl::string_view value, absl::string_view expected);
  // A field that is absent, placed at its parent; or a member of the element "train[0]", placed there.
  void Missing(const std::string& path, absl::string_view expected);
  void ErrorAt(int line, int column, absl::string_view message);
  void OverrideError(absl::string_view as_typed, absl::string_view message);

  // "path=value: expected ..." from a check of the plain structs; dropped if the path, or a message around
  // it, has an error already.
  void Finding(absl::string_view line);
  // Drops findings on a value that could not be derived because of another error.
  void NoFindingsOn(const std::string& path) { refused_.insert(path); }

  bool ok() const { return errors_.empty(); }
  absl::Status status() const;  // one line an error

 private:
  struct Place {
    std::string text;        // "file:3:5" or "--set path=value"
    bool is_override_of_it;  // the override names this very field: no need to say it twice
  };
  Place Locate(const std::string& path) const;
  // Line and column, from 1, of the field or of the nearest message around it; {1, 1} if there is none.
  std::pair<int, int> PositionOf(const std::string& path) const;
  // The override of the path or of the nearest message around it.
  const std::pair<const std::string, std::string>* OverrideOf(std::string path) const;

  std::string file_;
  const google::protobuf::Descriptor* type_;
  google::protobuf::TextFormat::ParseInfoTree tree_;
  std::map<std::string, std::string> overrides_, filled_, unset_;
  std::set<std::string> refused_;  // paths with an error
  std::vector<std::string> errors_;
};

// "text" with everything outside printable ASCII escaped, cut after 200 characters.
std::string Printable(absl::string_view text);

}  // namespace annulus::config
