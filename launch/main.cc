// The `annulus` program. `annulus --help` lists the subcommands; `annulus COMMAND --help` explains one.
// Exit codes: 0 done, 1 an error (printed to stderr), 2 a wrong command line.

#include <cstdio>

#include "commands.h"

namespace annulus {
namespace {

std::vector<Command> Commands() {
  return {TrainCommand(), CheckCommand(), PlanCommand(), SampleCommand(), DoctorCommand()};
}

int PrintHelp(std::FILE* to, int exit_code) {
  std::fprintf(to, "annulus pretrains language models whose sequences are split over several ranks.\n\n");
  for (const Command& command : Commands()) {
    std::fprintf(to, "  annulus %-7s %-7s %s\n", command.spec.name, command.spec.operand,
                 command.spec.summary);
  }
  std::fprintf(to,
               "\nannulus COMMAND --help explains one. Several ranks: launch/mpirun -n 4 build/annulus train "
               "CONFIG\n");
  return exit_code;
}

int Main(const std::vector<std::string>& args) {
  if (args.size() < 2) return PrintHelp(stderr, 2);
  if (args[1] == "--help" || args[1] == "help") return PrintHelp(stdout, 0);
  std::string command_line;
  for (const std::string& arg : args) absl::StrAppend(&command_line, command_line.empty() ? "" : " ", arg);

  const std::vector<std::string> rest(args.begin() + 2, args.end());
  for (const Command& command : Commands()) {
    if (args[1] != command.spec.name) continue;
    for (const std::string& arg : rest) {
      if (arg == "--help") return std::fputs(Usage(command.spec).c_str(), stdout) < 0;
    }
    const absl::StatusOr<Arguments> arguments = Arguments::Parse(command.spec, rest);
    if (!arguments.ok()) {
      std::fprintf(stderr, "%s\n", std::string(arguments.status().message()).c_str());
      return 2;
    }
    const absl::Status status = command.run(*arguments, command_line);
    if (status.ok()) return 0;
    // An empty message: another rank reports it.
    if (!status.message().empty()) std::fprintf(stderr, "error: %s\n", std::string(status.message()).c_str());
    return 1;
  }
  std::fprintf(stderr, "annulus: unknown command `%s`\n\n", args[1].c_str());
  return PrintHelp(stderr, 2);
}

}  // namespace
}  // namespace annulus

int main(int argc, char** argv) { return annulus::Main({argv, argv + argc}); }
