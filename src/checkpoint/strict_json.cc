#include "strict_json.h"

#include <algorithm>
#include <limits>
#include <unordered_set>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "annulus/base/hash.h"

namespace annulus {
namespace {

using nlohmann::json;

// Walks the text without building anything; the first violation stops it.
class StrictSax : public nlohmann::json_sax<json> {
 public:
  explicit StrictSax(int max_depth) : max_depth_(max_depth) {}
  const std::string& error() const { return error_; }

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_array(std::size_t) override { return Enter(); }
  bool end_array() override {
    --depth_;
    return true;
  }
  bool start_object(std::size_t) override {
    keys_.emplace_back();
    return Enter();
  }
  bool end_object() override {
    keys_.pop_back();
    --depth_;
    return true;
  }
  bool key(string_t& name) override {
    if (keys_.back().insert(name).second) return true;
    error_ = absl::StrCat("key \"", name, "\" appears twice");
    return false;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) override {
    error_ = absl::StrCat("not valid JSON at byte ", position);
    return false;
  }

 private:
  bool Enter() {
    if (++depth_ <= max_depth_) return true;
    error_ = absl::StrCat("nested deeper than the ", max_depth_, " levels of this format");
    return false;
  }

  int max_depth_;
  int depth_ = 0;
  std::vector<std::unordered_set<std::string>> keys_;  // of the open objects
  std::string error_;
};

// The value for an error message: short and ASCII.
std::string Brief(const json& value) {
  constexpr size_t kMaxCharacters = 60;
  if (value.is_structured()) return value.is_array() ? "an array" : "an object";
  std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true);
  if (text.size() > kMaxCharacters) text = text.substr(0, kMaxCharacters) + "...";
  return text;
}

absl::Status Unexpected(const json& value, absl::string_view where, absl::string_view expected) {
  return Invalid(where, "=", Brief(value), ": expected ", expected);
}

}  // namespace

absl::StatusOr<json> ParseStrictJson(absl::string_view text, int max_depth) {
  if (const size_t nul = text.find('\0'); nul != absl::string_view::npos)
    return Invalid("not valid JSON at byte ", nul, ": a NUL byte");
  StrictSax sax(max_depth);
  if (!json::sax_parse(text.begin(), text.end(), &sax)) return Invalid(sax.error());
  json value = json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) return Invalid("not valid JSON");
  return value;
}

absl::StatusOr<std::string> ToJsonText(const json& value, int indent) {
  try {
    return value.dump(indent);
  } catch (const json::type_error&) {  // the library's only report of invalid UTF-8
    return Invalid("expected UTF-8 text, got \"",
                   value.dump(-1, ' ', true, json::error_handler_t::replace).substr(0, 200), "\"");
  }
}

absl::Status ExpectKeys(const json& value, absl::string_view where,
                        std::initializer_list<absl::string_view> keys) {
  if (!value.is_object()) return Unexpected(value, where, "an object");
  for (const absl::string_view key : keys)
    if (!value.contains(std::string(key))) return Invalid(where, ": \"", key, "\" is missing");
  for (const auto& [key, unused] : value.items())
    if (std::find(keys.begin(), keys.end(), key) == keys.end())
      return Invalid(where, ": unknown key \"", key, "\"");
  return absl::OkStatus();
}

absl::Status ExpectArray(const json& value, absl::string_view where) {
  return value.is_array() ? absl::OkStatus() : Unexpected(value, where, "an array");
}

absl::StatusOr<std::string> AsString(const json& value, absl::string_view where) {
  if (!value.is_string()) return Unexpected(value, where, "a string");
  return value.get<std::string>();
}

absl::StatusOr<uint64_t> AsUint64(const json& value, absl::string_view where) {
  // Negative, fractional and larger numbers are read as other types.
  if (!value.is_number_unsigned()) return Unexpected(value, where, "an integer from 0 to 2^64 - 1");
  return value.get<uint64_t>();
}

absl::StatusOr<int64_t> AsCount(const json& value, absl::string_view where) {
  if (!value.is_number_unsigned() ||
      value.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
    return Unexpected(value, where, "an integer from 0 to 2^63 - 1");
  return value.get<int64_t>();
}

absl::StatusOr<uint64_t> AsHex64(const json& value, absl::string_view where) {
  uint64_t number = 0;
  if (!value.is_string() || !absl::SimpleHexAtoi(value.get<std::string>(), &number) ||
      Hex64(number) != value.get<std::string>())
    return Unexpected(value, where, "16 hexadecimal digits in lower case");
  return number;
}

}  // namespace annulus
