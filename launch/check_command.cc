#include <algorithm>
#include <cstdio>

#include "annulus/base/file.h"
#include "annulus/train/config.h"
#include "annulus/train/placement.h"
#include "annulus/train/plan_exchange.h"
#include "commands.h"

namespace annulus {
namespace {

// Builds and proves the exchange of every kind of attention layer; one line for each.
absl::StatusOr<std::string> CheckPlans(RunSpec spec) {
  if (spec.parallel.cp == 1) return std::string();  // nothing is exchanged
  ANNULUS_RETURN_IF_ERROR(ResolvePlannedDevice(&spec));
  ANNULUS_ASSIGN_OR_RETURN(const MachineProfile machine, ProfileOf(spec));
  const ExampleBatch batch = ExampleBatchOf(spec);
  ANNULUS_ASSIGN_OR_RETURN(
      const std::vector<PlannedPass> passes,
      PlanExchange(spec, batch.sequences, ExchangeOptionsOf(spec, TransportsOnOneHost(spec), machine)));
  std::string text;
  for (const PlannedPass& pass : passes) {
    ANNULUS_RETURN_IF_ERROR(Validate(pass.plan));
    absl::StrAppend(&text, "exchange of ", LayersText(pass.kind), " ", Name(pass.pass), " on ",
                    spec.parallel.cp, " ranks: ", pass.plan.name, ", proved\n");
  }
  return text;
}

absl::Status Run(const Arguments& arguments, const std::string&) {
  ANNULUS_ASSIGN_OR_RETURN(const std::optional<int64_t> world, arguments.PositiveInt("--world"));
  ANNULUS_ASSIGN_OR_RETURN(const std::string text, ReadFile(arguments.operand()));
  ANNULUS_ASSIGN_OR_RETURN(const ResolvedConfig config,
                           LoadConfig(arguments.operand(), text, arguments.All("--set"), world));
  ANNULUS_ASSIGN_OR_RETURN(const std::string plans, CheckPlans(config.spec));
  const std::string ranks = world.has_value() ? absl::StrCat(" for ", *world, " ranks") : "";
  std::printf("%s\n%s%s: valid%s\n", config.text.c_str(), plans.c_str(), arguments.operand().c_str(),
              ranks.c_str());
  return absl::OkStatus();
}

}  // namespace

Command CheckCommand() {
  return {{"check",
           "CONFIG",
           "checks a configuration and its exchange plans, and prints it resolved; runs nothing",
           {{"--world", Option::Takes::kValue, "N", "checks it for N ranks"},
            {"--set", Option::Takes::kValue, "PATH=VALUE", "overrides a field; repeatable"}}},
          Run};
}

}  // namespace annulus
