#include "annulus/train/study_config.h"

#include <filesystem>

#include "bind_study.h"
#include "parse.h"
#include "path.h"
#include "print.h"

namespace annulus {
namespace {

constexpr size_t kLongestText = size_t{1} << 20;

}  // namespace

std::vector<std::string> MeasureOverrides(const StudySpec& spec) {
  return {absl::StrCat("optim.steps=", spec.warm_up + spec.steps),
          "optim.schedule={ constant { } }",
          "checkpoint.every_steps=0",
          "checkpoint.keep=0",
          "eval.every_steps=0",
          "eval.sequences=1",
          "sample.tokens=0"};
}

absl::StatusOr<ResolvedStudy> LoadStudy(const std::string& path, const std::string& text,
                                        const std::vector<std::string>& overrides) {
  if (text.size() > kLongestText) {
    return Invalid(config::Printable(path), ": ", text.size(), " bytes; expected at most ", kLongestText);
  }
  config::Provenance provenance(path, config::Study::descriptor());
  config::Study study;
  for (const config::SyntaxError& error : config::ParseMessage(text, "", &study, provenance.tree())) {
    provenance.ErrorAt(error.line, error.column, error.message);
  }
  ANNULUS_RETURN_IF_ERROR(provenance.status());
  for (const std::string& override : overrides) {
    provenance.MarkOverride(config::JoinPath("", "set", study.set_size()), override);
    study.add_set(override);
  }
  ResolvedStudy resolved;
  resolved.spec = config::BindStudy(std::filesystem::path(path).parent_path().string(), &study, &provenance);
  ANNULUS_RETURN_IF_ERROR(provenance.status());
  resolved.text = config::PrintResolved(study, provenance);
  return resolved;
}

}  // namespace annulus
