#pragma once

// The subcommands of the `annulus` program. Each takes the arguments after its name and returns a Status;
// main prints errors and sets the exit code.

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "annulus/base/status.h"

namespace annulus {

struct Option {
  enum class Takes { kNothing, kValue };
  const char* name;  // "--set"
  Takes takes;
  const char* value;  // placeholder in the usage text
  const char* help;
};

struct CommandSpec {
  const char* name;
  const char* operand;  // placeholder of the one positional argument; empty if it takes none
  const char* summary;
  std::vector<Option> options;
};

// Parsed command line: the operand and every given option in order.
class Arguments {
 public:
  // InvalidArgument names what is unknown or missing, with "did you mean" left to --help.
  static absl::StatusOr<Arguments> Parse(const CommandSpec& spec, const std::vector<std::string>& args);

  const std::string& operand() const { return operand_; }
  std::vector<std::string> names() const;  // of the given options, in order
  bool Has(absl::string_view option) const;
  std::vector<std::string> All(absl::string_view option) const;
  std::string Last(absl::string_view option, absl::string_view fallback) const;
  // The option's value as an integer >= 1.
  absl::StatusOr<std::optional<int64_t>> PositiveInt(absl::string_view option) const;
  // The same, of at most `most`; `fallback` if it is not given.
  absl::StatusOr<int64_t> PositiveInt(absl::string_view option, int64_t fallback,
                                      int64_t most = std::numeric_limits<int64_t>::max()) const;
  // The option's value as a number > 0.
  absl::StatusOr<double> PositiveNumber(absl::string_view option, double fallback) const;

 private:
  std::string operand_;
  std::vector<std::pair<std::string, std::string>> options_;
};

// Refuses a file that an option names and that cannot be written, before the work whose result it is to hold.
// What is there stays as it is. OK if the option is not given and there is no `fallback`.
absl::Status CheckOutputFile(const Arguments& arguments, absl::string_view option,
                             absl::string_view fallback = "");

std::string Usage(const CommandSpec& spec);

struct Command {
  CommandSpec spec;
  absl::Status (*run)(const Arguments& arguments, const std::string& command_line);
  // What --help explains beside these arguments; null: all of it.
  CommandSpec (*spec_for)(const std::vector<std::string>& args) = nullptr;
};

Command TrainCommand();
Command CheckCommand();
Command PlanCommand();
Command SampleCommand();
Command DoctorCommand();
Command BenchCommand();
Command CalibrateCommand();
Command ExportCommand();
Command ImportCommand();
Command ConvertCommand();
Command StudyCommand();
Command ReportCommand();

}  // namespace annulus
