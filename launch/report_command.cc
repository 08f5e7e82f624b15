// `annulus report`: the page and the numbers of a run or of a study, from its files.

#include <cstdio>

#include "annulus/base/file.h"
#include "annulus/study/report.h"
#include "commands.h"

namespace annulus {
namespace {

struct Texts {
  std::string html, csv;
};

absl::StatusOr<Texts> TextsOf(const std::string& folder) {
  Texts texts;
  if (Exists(folder + "/study.resolved.textproto")) {
    ANNULUS_ASSIGN_OR_RETURN(const StudyResults results, ReadStudy(folder));
    texts = {.html = StudyHtml(results), .csv = StudyCsv(results)};
    return texts;
  }
  ANNULUS_ASSIGN_OR_RETURN(texts.html, RunHtml(folder));
  ANNULUS_ASSIGN_OR_RETURN(texts.csv, RunCsv(folder));
  return texts;
}

absl::Status Write(const std::string& path, const std::string& text) {
  ANNULUS_RETURN_IF_ERROR(WriteFileAtomically(path, text));
  std::printf("%s\n", path.c_str());
  return absl::OkStatus();
}

absl::Status Run(const Arguments& arguments, const std::string&) {
  ANNULUS_RETURN_IF_ERROR(CheckOutputFile(arguments, "--out"));
  ANNULUS_RETURN_IF_ERROR(CheckOutputFile(arguments, "--csv"));
  const std::string& folder = arguments.operand();
  ANNULUS_ASSIGN_OR_RETURN(const Texts texts, TextsOf(folder));
  ANNULUS_RETURN_IF_ERROR(Write(arguments.Last("--out", folder + "/report.html"), texts.html));
  return arguments.Has("--csv") ? Write(arguments.Last("--csv", ""), texts.csv) : absl::OkStatus();
}

}  // namespace

Command ReportCommand() {
  return {{"report",
           "DIR",
           "draws a run or a study on a page: loss, throughput, memory, scaling",
           {{"--out", Option::Takes::kValue, "FILE", "the page (default: DIR/report.html)"},
            {"--csv", Option::Takes::kValue, "FILE", "writes the numbers of every step or point too"}}},
          Run};
}

}  // namespace annulus
