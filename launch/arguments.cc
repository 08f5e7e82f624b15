#include <algorithm>
#include <filesystem>

#include "absl/strings/numbers.h"
#include "annulus/base/file.h"
#include "commands.h"

namespace annulus {

absl::StatusOr<Arguments> Arguments::Parse(const CommandSpec& spec, const std::vector<std::string>& args) {
  Arguments parsed;
  bool have_operand = false;
  for (size_t i = 0; i < args.size(); ++i) {
    if (args[i].rfind("-", 0) != 0 || args[i] == "-") {
      if (have_operand || *spec.operand == '\0') {
        return Invalid("annulus ", spec.name, ": unexpected argument `", args[i], "`\n\n", Usage(spec));
      }
      parsed.operand_ = args[i];
      have_operand = true;
      continue;
    }
    const std::string name = args[i].substr(0, args[i].find('='));
    const Option* option = nullptr;
    for (const Option& candidate : spec.options) {
      if (name == candidate.name) option = &candidate;
    }
    if (option == nullptr)
      return Invalid("annulus ", spec.name, ": unknown option ", name, "\n\n", Usage(spec));
    const bool inline_value = name.size() < args[i].size();
    if (option->takes == Option::Takes::kNothing) {
      if (inline_value) return Invalid("annulus ", spec.name, ": ", name, " takes no value");
      parsed.options_.emplace_back(name, "");
    } else if (inline_value) {
      parsed.options_.emplace_back(name, args[i].substr(name.size() + 1));
    } else if (i + 1 < args.size()) {
      parsed.options_.emplace_back(name, args[++i]);
    } else {
      return Invalid("annulus ", spec.name, ": ", name, ": expected ", option->value, " after it");
    }
  }
  if (!have_operand && *spec.operand != '\0') {
    return Invalid("annulus ", spec.name, ": expected ", spec.operand, "\n\n", Usage(spec));
  }
  return parsed;
}

std::vector<std::string> Arguments::names() const {
  std::vector<std::string> names;
  for (const auto& [name, value] : options_) names.push_back(name);
  return names;
}

bool Arguments::Has(absl::string_view option) const { return !All(option).empty(); }

std::vector<std::string> Arguments::All(absl::string_view option) const {
  std::vector<std::string> values;
  for (const auto& [name, value] : options_) {
    if (name == option) values.push_back(value);
  }
  return values;
}

std::string Arguments::Last(absl::string_view option, absl::string_view fallback) const {
  const std::vector<std::string> values = All(option);
  return values.empty() ? std::string(fallback) : values.back();
}

absl::StatusOr<std::optional<int64_t>> Arguments::PositiveInt(absl::string_view option) const {
  if (!Has(option)) return std::optional<int64_t>();
  ANNULUS_ASSIGN_OR_RETURN(const int64_t value, PositiveInt(option, 1));
  return std::optional<int64_t>(value);
}

absl::StatusOr<int64_t> Arguments::PositiveInt(absl::string_view option, int64_t fallback,
                                               int64_t most) const {
  if (!Has(option)) return fallback;
  const std::string text = Last(option, "");
  int64_t value = 0;
  const bool read = absl::SimpleAtoi(text, &value);
  if (read && value >= 1 && value <= most) return value;
  const bool digits = !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
  const bool too_large = digits && value > 0;  // SimpleAtoi leaves the largest value for more than that
  return Invalid(option, "=", text, ": expected an integer of at ",
                 too_large ? absl::StrCat("most ", most) : "least 1");
}

absl::StatusOr<double> Arguments::PositiveNumber(absl::string_view option, double fallback) const {
  if (!Has(option)) return fallback;
  double value = 0;
  if (!absl::SimpleAtod(Last(option, ""), &value) || !(value > 0) || value > 1e300) {
    return Invalid(option, "=", Last(option, ""), ": expected a number above 0");
  }
  return value;
}

absl::Status CheckOutputFile(const Arguments& arguments, absl::string_view option,
                             absl::string_view fallback) {
  const std::string path = arguments.Last(option, fallback);
  if (path.empty() && !arguments.Has(option)) return absl::OkStatus();
  std::error_code ignored;
  if (path.empty() || path.back() == '/' || std::filesystem::is_directory(path, ignored))
    return Invalid(option, "=", path, ": expected a file to write");
  // Written as it will be: through a file beside it that is renamed.
  const std::string tmp = path + ".tmp";
  absl::Status status = DurableFile::Create(tmp).status();
  if (status.ok()) return RemoveAll(tmp);
  const std::string reason(status.message());
  return absl::Status(status.code(),
                      absl::StrCat(option, "=", path, ": expected a file that can be written",
                                   reason.substr(std::min(reason.size(), reason.rfind(": ")))));
}

std::string Usage(const CommandSpec& spec) {
  std::string text = absl::StrCat("usage: annulus ", spec.name, *spec.operand ? " " : "", spec.operand,
                                  spec.options.empty() ? "" : " [options]", "\n  ", spec.summary, "\n");
  for (const Option& option : spec.options) {
    const std::string left = absl::StrCat("  ", option.name, *option.value ? " " : "", option.value);
    absl::StrAppend(&text, left, std::string(left.size() < 28 ? 28 - left.size() : 1, ' '), option.help,
                    "\n");
  }
  return text;
}

}  // namespace annulus
