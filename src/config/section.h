#pragma once

// One message of the configuration, read into plain members: checks ranges, and writes what the text leaves
// away into the message, so that the message printed afterwards is complete. The default of an optional
// value is what its member holds.

#include <google/protobuf/message.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "annulus/base/check.h"
#include "annulus/train/ranges.h"
#include "provenance.h"

namespace annulus::config {

enum class Presence { kRequired, kOptional };

class Section {
 public:
  Section(google::protobuf::Message* message, std::string path, Provenance* provenance)
      : message_(message), path_(std::move(path)), provenance_(provenance) {}

  Provenance* provenance() const { return provenance_; }
  const std::string& path() const { return path_; }
  std::string PathOf(const std::string& name) const;
  bool Has(const std::string& name) const;

  // The message in field `name`; an absent one is made, so that its defaults are printed.
  Section Child(const std::string& name) const;
  // The same, or an error and nothing if it is absent.
  std::optional<Section> RequiredChild(const std::string& name) const;
  std::vector<Section> Children(const std::string& name) const;
  // Name of the member of the oneof that is set, "" if none.
  std::string Chosen(const std::string& oneof) const;

  void Int(const std::string& name, Presence presence, const IntRange& range, int64_t* value) const;
  void Seed(const std::string& name, uint64_t* value) const;
  void Real(const std::string& name, Presence presence, const RealRange& range, double* value) const;
  void Bool(const std::string& name, bool* value) const;
  void String(const std::string& name, Presence presence, std::string* value) const;
  // A text that is not empty and holds no zero byte.
  void Path(const std::string& name, Presence presence, std::string* path) const;
  // A required text that becomes a part of a directory's name.
  void FileName(const std::string& name, std::string* value) const;
  // `values` pairs every name of the field's enum with what it means.
  template <typename T>
  void Enum(const std::string& name, const std::vector<std::pair<std::string, T>>& values, T* value,
            Presence presence = Presence::kOptional) const {
    std::string fallback;
    for (const auto& [label, meaning] : values) {
      if (meaning == *value) fallback = label;
    }
    const std::string given = EnumName(name, presence, fallback);
    for (const auto& [label, meaning] : values) {
      if (label == given) *value = meaning;
    }
  }
  // Sets an absent integer, with how it was derived.
  void Derive(const std::string& name, int64_t value, const std::string& how) const;

 private:
  const google::protobuf::FieldDescriptor* Field(const std::string& name) const;
  // Whether the field is set. If not: an error if it is required, else it is marked as a default.
  bool Given(const std::string& name, Presence presence, const std::string& expected) const;
  std::string EnumName(const std::string& name, Presence presence, const std::string& fallback) const;

  google::protobuf::Message* message_;
  std::string path_;
  Provenance* provenance_;
};

}  // namespace annulus::config
