#include <cstdio>

#include "annulus/base/file.h"
#include "annulus/train/config.h"
#include "commands.h"

namespace annulus {
namespace {

absl::Status Run(const Arguments& arguments, const std::string&) {
  ANNULUS_ASSIGN_OR_RETURN(const std::optional<int64_t> world, arguments.PositiveInt("--world"));
  ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(arguments.operand()));
  ANNULUS_ASSIGN_OR_RETURN(const ResolvedConfig config,
                           LoadConfig(arguments.operand(), text, arguments.All("--set"), world));
  const std::string ranks = world.has_value() ? absl::StrCat(" for ", *world, " ranks") : "";
  std::printf("%s\n%s: valid%s\n", config.text.c_str(), arguments.operand().c_str(), ranks.c_str());
  return absl::OkStatus();
}

}  // namespace

Command CheckCommand() {
  return {{"check",
           "CONFIG",
           "checks a configuration and prints it resolved; runs nothing",
           {{"--world", Option::Takes::kValue, "N", "checks it for N ranks"},
            {"--set", Option::Takes::kValue, "PATH=VALUE", "overrides a field; repeatable"}}},
          Run};
}

}  // namespace annulus
