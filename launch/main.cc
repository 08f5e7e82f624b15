// The `annulus` program. `annulus --help` lists the subcommands; `annulus COMMAND --help` explains one.
// Exit codes: 0 done, 1 an error (printed to stderr), 2 a wrong command line.

#include <csignal>
#include <cstdio>
#include <cstdlib>

#include "commands.h"

namespace annulus {
namespace {

std::vector<Command> Commands() {
  return {TrainCommand(),  CheckCommand(),   PlanCommand(),      SampleCommand(),
          DoctorCommand(), BenchCommand(),   CalibrateCommand(), ExportCommand(),
          ImportCommand(), ConvertCommand(), StudyCommand(),     ReportCommand()};
}

bool IsHelp(const std::string& arg) { return arg == "--help" || arg == "-h"; }

int PrintHelp(std::FILE* to, int exit_code) {
  std::fprintf(to, "annulus pretrains language models whose sequences are split over several ranks.\n\n");
  for (const Command& command : Commands()) {
    std::fprintf(to, "  annulus %-9s %-7s %s\n", command.spec.name, command.spec.operand,
                 command.spec.summary);
  }
  std::fprintf(to,
               "\nannulus COMMAND --help explains one. Several ranks: launch/mpirun -n 4 build/annulus train "
               "CONFIG\n");
  return exit_code;
}

// A wrong command line is wrong on every rank alike: one reports it, and its exit code becomes the job's.
int WrongCommandLine(const std::string& message) {
  const char* rank = std::getenv("OMPI_COMM_WORLD_RANK");
  if (rank != nullptr && absl::string_view(rank) != "0") return 0;
  std::fprintf(stderr, "error: %s\n", message.c_str());
  return 2;
}

int Main(const std::vector<std::string>& args) {
  if (args.size() < 2) return PrintHelp(stderr, 2);
  if (IsHelp(args[1]) || args[1] == "help") return PrintHelp(stdout, 0);
  std::string command_line;
  for (const std::string& arg : args) absl::StrAppend(&command_line, command_line.empty() ? "" : " ", arg);

  const std::vector<std::string> rest(args.begin() + 2, args.end());
  for (const Command& command : Commands()) {
    if (args[1] != command.spec.name) continue;
    for (const std::string& arg : rest) {
      if (!IsHelp(arg)) continue;
      const CommandSpec spec = command.spec_for == nullptr ? command.spec : command.spec_for(rest);
      return std::fputs(Usage(spec).c_str(), stdout) < 0;
    }
    const absl::StatusOr<Arguments> arguments = Arguments::Parse(command.spec, rest);
    if (!arguments.ok()) return WrongCommandLine(std::string(arguments.status().message()));
    const absl::Status status = command.run(*arguments, command_line);
    if (status.ok()) return 0;
    // An empty message: rank 0 reports it, and its exit code is the job's. With one of its own this rank
    // could make mpirun end rank 0 before it has.
    if (status.message().empty()) return 0;
    std::fprintf(stderr, "error: %s\n", std::string(status.message()).c_str());
    return 1;
  }
  return WrongCommandLine(absl::StrCat("unknown command `", args[1], "`; annulus --help lists them"));
}

}  // namespace
}  // namespace annulus

int main(int argc, char** argv) {
  // Under a limit on file sizes the write fails, and its error names the file; the signal would only kill.
  std::signal(SIGXFSZ, SIG_IGN);
  return annulus::Main({argv, argv + argc});
}
