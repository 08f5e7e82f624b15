#pragma once

// Protobuf text into a message, with every error placed at its line, column and field path.

#include <google/protobuf/text_format.h>

#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace annulus::config {

struct SyntaxError {
  enum class Severity {
    kFatal,  // parsing stopped here
    kGoesOn  // an unknown field, skipped: the rest of the message is usable for further checks
  };
  Severity severity;
  int line, column;  // from 1
  std::string message;
};

// Parses `text` into the empty `message`; `tree` may be null. `path` is the message's own, "" for the run.
std::vector<SyntaxError> ParseMessage(const std::string& text, absl::string_view path,
                                      google::protobuf::Message* message,
                                      google::protobuf::TextFormat::ParseInfoTree* tree);

// Sets a number or bool from its text alone. False if it is none; `message` may then have changed.
bool ParseScalar(const std::string& text, const google::protobuf::FieldDescriptor& field,
                 google::protobuf::Message* message);

}  // namespace annulus::config
