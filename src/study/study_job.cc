#include "study_job.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <thread>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "annulus/base/file.h"
#include "annulus/train/report.h"

namespace annulus {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kPoll = std::chrono::milliseconds(5);
constexpr auto kGrace = std::chrono::seconds(5);  // from SIGTERM to SIGKILL; mpirun itself takes a few
constexpr size_t kReasonLines = 4;
constexpr size_t kLongestReason = 2000;

[[noreturn]] void Execute(const ChildJob& job, pid_t parent) {
  // mpirun ends its ranks when it gets this signal; it comes when this process ends, by SIGKILL too.
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (getppid() != parent) _exit(126);  // it has ended already
  const int in = open("/dev/null", O_RDONLY);
  const int out = open(job.log.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (in < 0 || out < 0 || dup2(in, 0) < 0 || dup2(out, 1) < 0 || dup2(out, 2) < 0) _exit(126);
  std::vector<char*> argv;
  for (const std::string& word : job.words) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  execv(argv[0], argv.data());
  _exit(127);
}

// Children of this process; of ranks whose mpirun has ended, this one is the parent.
std::vector<pid_t> Children() {
  const absl::StatusOr<std::string> text = ReadFile(absl::StrCat("/proc/self/task/", getpid(), "/children"));
  std::vector<pid_t> children;
  for (const absl::string_view word : absl::StrSplit(text.ok() ? *text : "", ' ', absl::SkipWhitespace())) {
    int pid = 0;
    if (absl::SimpleAtoi(word, &pid)) children.push_back(pid);
  }
  return children;
}

// Collects ended children; false once none is left. Sets `status` when it is that of `job`.
bool AnyLeft(pid_t job, int* status) {
  int ended_status = 0;
  pid_t ended;
  while ((ended = waitpid(-1, &ended_status, WNOHANG)) > 0) {
    if (ended == job) *status = ended_status;
  }
  return ended == 0;
}

bool WaitUntilNoneIsLeft(pid_t job, Clock::time_point deadline, int* status) {
  while (AnyLeft(job, status)) {
    if (Clock::now() >= deadline) return false;
    std::this_thread::sleep_for(kPoll);
  }
  return true;
}

// SIGTERM lets mpirun end its ranks in order; what is left after a while goes by force.
void End(pid_t job, int* status) {
  kill(job, SIGTERM);
  if (WaitUntilNoneIsLeft(job, Clock::now() + kGrace, status)) return;
  while (AnyLeft(job, status)) {
    for (const pid_t child : Children()) kill(child, SIGKILL);
    std::this_thread::sleep_for(kPoll);
  }
}

}  // namespace

std::string ReasonIn(const std::string& log) {
  const absl::StatusOr<std::string> text = ReadFile(log);
  if (!text.ok()) return std::string(text.status().message());
  std::vector<std::string> lines, errors;
  for (const absl::string_view line : absl::StrSplit(*text, '\n')) {
    const absl::string_view stripped = absl::StripAsciiWhitespace(line);
    if (stripped.empty()) continue;
    lines.emplace_back(stripped);
    if (absl::StartsWith(stripped, "error:") || absl::StartsWith(stripped, "watchdog:"))
      errors.emplace_back(stripped);
  }
  const std::vector<std::string>& told = errors.empty() ? lines : errors;
  const size_t first = errors.empty() ? lines.size() - std::min(lines.size(), kReasonLines) : 0;
  const size_t last = std::min(told.size(), first + kReasonLines);
  const std::vector<std::string> shown(told.begin() + static_cast<std::ptrdiff_t>(first),
                                       told.begin() + static_cast<std::ptrdiff_t>(last));
  return absl::StrCat(absl::StrJoin(shown, " | ").substr(0, kLongestReason), " (", log, ")");
}

std::string TookTooLong(double limit_seconds, const std::string& log) {
  return absl::StrCat("took longer than measure.limit_minutes, ", FormatDuration(limit_seconds), ": ",
                      ReasonIn(log));
}

absl::Status RunChildJob(const ChildJob& job) {
  // Ranks that outlive their mpirun become children of this process, which then ends them.
  if (prctl(PR_SET_CHILD_SUBREAPER, 1) != 0) return FileError("become a subreaper for", job.words.front());
  const pid_t self = getpid();
  const pid_t child = fork();
  if (child < 0) return FileError("fork for", job.words.front());
  if (child == 0) Execute(job, self);
  int status = 0;
  const auto limit =
      std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(job.limit_seconds));
  if (!WaitUntilNoneIsLeft(child, Clock::now() + limit, &status)) {
    End(child, &status);
    return absl::DeadlineExceededError(TookTooLong(job.limit_seconds, job.log));
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return absl::OkStatus();
  const std::string how = WIFEXITED(status) ? absl::StrCat("exit code ", WEXITSTATUS(status))
                                            : absl::StrCat("ended by signal ", WTERMSIG(status));
  return absl::UnavailableError(absl::StrCat(how, ": ", ReasonIn(job.log)));
}

}  // namespace annulus
