#pragma once

// JSON from files that may be damaged or hostile. Refuses what nlohmann::json lets through: repeated keys
// (it keeps the last), NUL bytes (it stops there) and any nesting depth, all before a tree is built.

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/strings/string_view.h"
#include "annulus/base/status.h"

namespace annulus {

// Errors say what is wrong and at which byte. An array or object at the top has depth 1.
absl::StatusOr<nlohmann::json> ParseStrictJson(absl::string_view text, int max_depth);

// Text of `value`; InvalidArgument if one of its strings is not UTF-8. Negative indent: one line.
absl::StatusOr<std::string> ToJsonText(const nlohmann::json& value, int indent);

// Typed reads. `where` names the value in errors.
absl::Status ExpectKeys(const nlohmann::json& value, absl::string_view where,
                        std::initializer_list<absl::string_view> keys);  // an object with exactly these
absl::Status ExpectArray(const nlohmann::json& value, absl::string_view where);
absl::StatusOr<std::string> AsString(const nlohmann::json& value, absl::string_view where);
absl::StatusOr<int64_t> AsCount(const nlohmann::json& value, absl::string_view where);  // 0 .. 2^63 - 1
absl::StatusOr<uint64_t> AsUint64(const nlohmann::json& value, absl::string_view where);
absl::StatusOr<uint64_t> AsHex64(const nlohmann::json& value, absl::string_view where);  // as Hex64 writes it

}  // namespace annulus
