// Which options and configuration fields mean something to a bench.

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "bench.h"

namespace annulus {
namespace {

// Hours of what takes milliseconds, and as an int.
constexpr int64_t kMostRepeats = 1000000;

// Far above what fits into any memory, and far from overflow once it is bytes.
constexpr int64_t kMostElements = int64_t{1} << 40;

bool Contains(const std::vector<absl::string_view>& names, absl::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// Whether `path` is one of the fields or lies inside of one: "parallel.cp" of "parallel".
bool IsIn(const std::vector<absl::string_view>& fields, absl::string_view path) {
  return std::any_of(fields.begin(), fields.end(), [&](absl::string_view field) {
    const absl::string_view rest = path.substr(std::min(path.size(), field.size()));
    return absl::StartsWith(path, field) && (rest.empty() || rest.front() == '.');
  });
}

}  // namespace

std::vector<std::string> OptionList(const Arguments& arguments, absl::string_view option,
                                    absl::string_view fallback) {
  return absl::StrSplit(arguments.Last(option, fallback), ',');
}

absl::StatusOr<std::vector<int64_t>> ReadLengths(const Arguments& arguments, absl::string_view fallback) {
  std::vector<int64_t> lengths;
  for (const std::string& text : OptionList(arguments, "--lengths", fallback)) {
    int64_t length = 0;
    if (!absl::SimpleAtoi(text, &length) || length < 1 || length > kMostTokens)
      return Invalid("--lengths=", text, ": expected integers from 1 to ", kMostTokens);
    lengths.push_back(length);
  }
  std::sort(lengths.begin(), lengths.end());
  return lengths;
}

absl::StatusOr<std::vector<LinkThrottle>> ReadThrottles(const Arguments& arguments,
                                                        absl::string_view fallback) {
  std::vector<LinkThrottle> throttles;
  for (const std::string& text : OptionList(arguments, "--throttles", fallback)) {
    double rate = 0;
    if (!absl::SimpleAtod(text, &rate) || !(rate >= 0) || rate > 1e6)
      return Invalid("--throttles=", text, ": expected rates from 0 (full speed) to 1e6 GB/s");
    throttles.push_back({rate * 1e9});
  }
  return throttles;
}

std::vector<absl::string_view> KnownOptions(const BenchKind& kind) {
  std::vector<absl::string_view> known = kind.options;
  for (const char* common : {"--repeats", "--json", "--set"}) known.emplace_back(common);
  return known;
}

absl::Status CheckBenchOptions(const BenchKind& kind, const Arguments& arguments) {
  const std::vector<absl::string_view> known = KnownOptions(kind);
  for (const std::string& name : arguments.names()) {
    if (Contains(known, name)) continue;
    return Invalid("annulus bench ", kind.name, ": ", name, " means nothing to it: expected one of ",
                   absl::StrJoin(known, ", "));
  }
  for (const std::string& set : arguments.All("--set")) {
    const std::string path = set.substr(0, set.find('='));
    if (kind.fields.empty() || IsIn(kind.fields, path) || path == "step_deadline_seconds") continue;
    return Invalid("annulus bench ", kind.name, ": --set ", set, ": ", path,
                   " means nothing to it: expected one of ", absl::StrJoin(kind.fields, ", "));
  }
  return ReadRepeats(arguments).status();
}

absl::StatusOr<int64_t> ReadRepeats(const Arguments& arguments) {
  return arguments.PositiveInt("--repeats", 10, kMostRepeats);
}

absl::Status CheckBenchTensor(absl::string_view what, const std::vector<int64_t>& sizes) {
  int64_t elements = 1;
  for (const int64_t size : sizes) {
    if (!__builtin_mul_overflow(elements, size, &elements) && elements <= kMostElements) continue;
    return Invalid(what, ": ", absl::StrJoin(sizes, " x "), " elements: expected at most ", kMostElements);
  }
  return absl::OkStatus();
}

}  // namespace annulus
