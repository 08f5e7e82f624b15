// `annulus report`: the page and the numbers of a run or of a study, from its files.

#include <cstdio>

#include "annulus/base/file.h"
#include "annulus/study/report.h"
#include "commands.h"

namespace annulus {
namespace {

absl::Status Run(const Arguments& arguments, const std::string&) {
  const std::string& folder = arguments.operand();
  ANNULUS_RETURN_IF_ERROR(CheckOutputFile(arguments, "--csv"));
  ANNULUS_ASSIGN_OR_RETURN(const std::string html, RunHtml(folder));
  const std::string out = arguments.Last("--out", folder + "/report.html");
  ANNULUS_RETURN_IF_ERROR(CheckOutputFile(arguments, "--out", out));
  ANNULUS_RETURN_IF_ERROR(WriteFileAtomically(out, html));
  std::printf("%s\n", out.c_str());
  if (!arguments.Has("--csv")) return absl::OkStatus();
  const std::string csv_path = arguments.Last("--csv", "");
  ANNULUS_ASSIGN_OR_RETURN(const std::string csv, RunCsv(folder));
  ANNULUS_RETURN_IF_ERROR(WriteFileAtomically(csv_path, csv));
  std::printf("%s\n", csv_path.c_str());
  return absl::OkStatus();
}

}  // namespace

Command ReportCommand() {
  return {{"report",
           "DIR",
           "draws a run's loss, throughput, memory and events on a page",
           {{"--out", Option::Takes::kValue, "FILE", "the page (default: DIR/report.html)"},
            {"--csv", Option::Takes::kValue, "FILE", "writes the numbers of every step too"}}},
          Run};
}

}  // namespace annulus
