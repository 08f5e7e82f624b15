#include "annulus/train/config.h"

#include <google/protobuf/stubs/common.h>

#include "absl/strings/match.h"
#include "annulus.pb.h"
#include "bind.h"
#include "overrides.h"
#include "parse.h"
#include "print.h"
#include "provenance.h"
#include "section.h"
#include "validate.h"

namespace annulus {
namespace {

constexpr size_t kLongestText = size_t{1} << 20;
constexpr size_t kMostOverrides = 1000;

absl::Status CheckSizes(const std::string& name, const std::string& text,
                        const std::vector<std::string>& overrides) {
  if (text.size() > kLongestText) {
    return Invalid(config::Printable(name), ": ", text.size(), " bytes of configuration; expected at most ",
                   kLongestText);
  }
  if (overrides.size() > kMostOverrides) {
    return Invalid("--set: ", overrides.size(), " overrides; expected at most ", kMostOverrides);
  }
  for (const std::string& override : overrides) {
    if (override.size() <= kLongestText / kMostOverrides) continue;
    return Invalid("--set ", config::Printable(override), ": ", override.size(), " bytes; expected at most ",
                   kLongestText / kMostOverrides);
  }
  return absl::OkStatus();
}

// Whether the text can be checked further: an unknown field is skipped, other errors end the parse.
bool Parse(const std::string& text, config::Run* run, config::Provenance* provenance) {
  bool usable = true;
  for (const config::SyntaxError& error : config::ParseMessage(text, "", run, provenance->tree())) {
    provenance->ErrorAt(error.line, error.column, error.message);
    usable = usable && error.severity == config::SyntaxError::Severity::kGoesOn;
  }
  return usable;
}

// parallel.dp where the text leaves it away.
void ResolveDataParallel(std::optional<int64_t> world, config::Run* run, config::Provenance* provenance,
                         ParallelSpec* parallel) {
  if (run->parallel().has_dp()) return;
  const int64_t inner = parallel->cp * parallel->tp;
  if (world.has_value() && *world >= inner && *world % inner == 0) {
    parallel->dp = *world / inner;
    config::Section(run, "", provenance)
        .Child("parallel")
        .Derive("dp", parallel->dp, absl::StrCat(*world, " ranks / (cp * tp)"));
  } else {
    provenance->MarkUnset("parallel.dp", "dp: the number of ranks / (cp * tp)");
  }
}

}  // namespace

absl::StatusOr<ResolvedConfig> LoadConfig(const std::string& name, const std::string& text,
                                          const std::vector<std::string>& overrides,
                                          std::optional<int64_t> world) {
  ANNULUS_RETURN_IF_ERROR(CheckSizes(name, text, overrides));
  config::Provenance provenance(name, config::Run::descriptor());
  config::Run run;
  if (!Parse(text, &run, &provenance)) return provenance.status();
  for (const std::string& override : overrides) config::ApplyOverride(override, &run, &provenance);
  ResolvedConfig resolved;
  resolved.spec = config::Bind(&run, &provenance);
  ResolveDataParallel(world, &run, &provenance, &resolved.spec.parallel);
  for (const std::string& finding : config::CheckRun(resolved.spec, world)) {
    // The pattern has its own error, in its own words.
    if (!absl::StartsWith(finding, "model.layers")) provenance.Finding(finding);
  }
  ANNULUS_RETURN_IF_ERROR(provenance.status());
  resolved.text = config::PrintResolved(run, provenance);
  return resolved;
}

std::string ProtobufVersion() { return google::protobuf::internal::VersionString(GOOGLE_PROTOBUF_VERSION); }

}  // namespace annulus
