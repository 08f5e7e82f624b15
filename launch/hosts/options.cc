#include "options.h"

#include <cmath>
#include <utility>

#include "absl/strings/numbers.h"
#include "annulus/base/status.h"
#include "namespaces.h"

namespace annulus::hosts {
namespace {

constexpr char kUsage[] =
    "\n\nusage: namespace_hosts --hosts N [options] -- COMMAND [ARGUMENT]...\n"
    "  --hosts N        host0, host1, ...; COMMAND runs on host0, and mpirun in it on all\n"
    "  --slots N        ranks that mpirun places on each host (1)\n"
    "  --rate RATE      of each host's link, each way: 100mbit, 2.5gbit (as fast as it goes)\n"
    "  --delay TIME     one way from host to host: 50us, 2ms (none)\n"
    "  --loss SHARE     of the frames: 0.1% (none)\n"
    "  --seed N         of the frames that are lost (1)\n"
    "  --control FIFO   takes lines while the command runs: `cut host1`, `mend host1`\n"
    "  --grace TIME     for what COMMAND leaves behind to end by itself; else it is an error (10s)\n";

using Units = std::vector<std::pair<std::string, double>>;

// A number of at least 0 and one of the units.
absl::StatusOr<double> ParseWithUnit(const std::string& text, const Units& units, const char* example) {
  for (const auto& [unit, factor] : units) {
    if (text.size() <= unit.size() || text.compare(text.size() - unit.size(), unit.size(), unit) != 0)
      continue;
    double value = 0;
    const std::string number = text.substr(0, text.size() - unit.size());
    if (absl::SimpleAtod(number, &value) && value >= 0 && value < 1e12) return value * factor;
  }
  return Invalid("expected ", example);
}

absl::StatusOr<int64_t> ParseInt(const std::string& text, int64_t least, int64_t most) {
  int64_t value = 0;
  if (absl::SimpleAtoi(text, &value) && least <= value && value <= most) return value;
  return Invalid("expected an integer from ", least, " to ", most);
}

// `to` becomes the value, or the error is returned.
template <typename T, typename To>
absl::Status Set(const absl::StatusOr<T>& value, To* to) {
  if (value.ok()) *to = static_cast<To>(*value);
  return value.status();
}

absl::Status SetOption(const std::string& name, const std::string& value, Options* options) {
  if (name == "--hosts") return Set(ParseInt(value, 2, kMostHosts), &options->hosts);
  if (name == "--slots") return Set(ParseInt(value, 1, 1024), &options->slots);
  if (name == "--seed") return Set(ParseInt(value, 0, int64_t{1} << 62), &options->link.seed);
  if (name == "--rate") return Set(ParseRate(value), &options->link.bits_per_second);
  if (name == "--loss") return Set(ParseShare(value), &options->link.loss);
  if (name == "--grace") return Set(ParseTime(value), &options->grace_seconds);
  if (name == "--control") return Set(absl::StatusOr<std::string>(value), &options->control);
  if (name != "--delay") return Invalid("unknown option");
  ANNULUS_ASSIGN_OR_RETURN(const double seconds, ParseTime(value));
  options->link.delay_ns = std::llround(seconds * kNanosecondsPerSecond);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<double> ParseRate(const std::string& text) {
  const auto rate =
      ParseWithUnit(text, {{"kbit", 1e3}, {"mbit", 1e6}, {"gbit", 1e9}}, "a rate, as 100mbit or 2.5gbit");
  if (rate.ok() && *rate == 0) return Invalid("expected a rate above 0");
  return rate;
}

absl::StatusOr<double> ParseTime(const std::string& text) {
  return ParseWithUnit(text, {{"us", 1e-6}, {"ms", 1e-3}, {"s", 1}}, "a time, as 50us, 2ms or 1.5s");
}

absl::StatusOr<double> ParseShare(const std::string& text) {
  const auto share = ParseWithUnit(text, {{"%", 0.01}}, "a share, as 0.1%");
  if (share.ok() && *share > 1) return Invalid("expected at most 100%");
  return share;
}

absl::StatusOr<Options> ParseOptions(const std::vector<std::string>& args) {
  Options options;
  size_t i = 0;
  for (; i < args.size() && args[i] != "--"; i += 2) {
    const std::string value = i + 1 < args.size() ? args[i + 1] : "";
    const absl::Status status = SetOption(args[i], value, &options);
    if (!status.ok()) return Invalid(args[i], "=", value, ": ", std::string(status.message()), kUsage);
  }
  if (options.hosts == 0) return Invalid("--hosts: expected the number of hosts", kUsage);
  if (i + 1 >= args.size()) return Invalid("expected -- and a command", kUsage);
  options.command.assign(args.begin() + static_cast<int64_t>(i) + 1, args.end());
  return options;
}

}  // namespace annulus::hosts
