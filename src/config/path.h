#pragma once

// Names of fields: "data.train[0].text.path" as steps, and lists of the names that a message or enum has.

#include <google/protobuf/descriptor.h>

#include <string>
#include <vector>

#include "annulus/base/status.h"

namespace annulus::config {

struct PathStep {
  std::string name;
  int index = -1;  // -1: none given
};

absl::StatusOr<std::vector<PathStep>> ParsePath(absl::string_view path);

// "" and "optim" give "optim"; "optim" and "steps" give "optim.steps"; an index of -1 is left away.
std::string JoinPath(absl::string_view parent, absl::string_view name, int index = -1);

std::vector<std::string> FieldNames(const google::protobuf::Descriptor& type);
std::vector<std::string> ValueNames(const google::protobuf::EnumDescriptor& type);

// "no such field; did you mean `lr`?", from the fields of `type`, else from a field of that name elsewhere.
std::string NoSuchField(const google::protobuf::Descriptor& type, absl::string_view name);
// "expected one of A, B (did you mean `A`?)"
std::string NoSuchValue(const google::protobuf::EnumDescriptor& type, absl::string_view name);

}  // namespace annulus::config
