// Runs a command on several hosts made of this one, between which links have a rate, a delay and losses:
//     namespace_hosts --hosts 2 --slots 2 --rate 1gbit --delay 100us -- launch/mpirun -n 4 build/annulus
//     train ...
// The command runs on host0; mpirun in it finds the hosts, and starts what belongs on the others there. All
// of it, hosts and processes, is gone when the command has ended, or this program has, however it ended. In
// the command `namespace_hosts host1 COMMAND...` runs something on another host, as ssh would.

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <thread>

#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "annulus/base/file.h"
#include "namespaces.h"
#include "options.h"
#include "switch.h"

namespace annulus::hosts {
namespace {

constexpr char kProcesses[] = "ANNULUS_NAMESPACE_HOSTS";  // process 1 of each host: "1 7 9"
constexpr char kHostFile[] = "/dev/shm/hostfile";
constexpr int kForwarded[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2};

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "namespace_hosts: error: %s\n", std::string(status.message()).c_str());
  return 1;
}

sigset_t WatchedSignals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGCHLD);
  for (const int signal : kForwarded) sigaddset(&set, signal);
  return set;
}

int ExitCodeOf(int status) { return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status); }

// What Open MPI's mpirun needs to find the hosts and to start its daemons on them.
absl::Status SetEnvironment(const Options& options, const std::vector<pid_t>& hosts) {
  std::string file;
  for (int host = 0; host < options.hosts; ++host)
    absl::StrAppend(&file, HostName(host), " slots=", options.slots, "\n");
  ANNULUS_RETURN_IF_ERROR(WriteFileDurably(kHostFile, file));
  setenv(kProcesses, absl::StrJoin(hosts, " ").c_str(), 1);
  setenv("OMPI_MCA_orte_default_hostfile", kHostFile, 1);
  const std::string self = std::filesystem::read_symlink("/proc/self/exe");
  setenv("OMPI_MCA_plm_rsh_agent", self.c_str(), 1);
  setenv("OMPI_MCA_plm_rsh_no_tree_spawn", "1", 1);  // only from host0 can the others be entered
  // Ranks of all hosts share the cores of this one.
  if (options.hosts * options.slots > static_cast<int>(std::thread::hardware_concurrency()))
    setenv("OMPI_MCA_mpi_yield_when_idle", "1", 1);
  return absl::OkStatus();
}

// The machine: process 1 of all, the switch, and parent of the command.
class Machine {
 public:
  explicit Machine(const Options& options) : options_(options) {}
  int Run();

 private:
  absl::Status SetUp();
  void StartCommand();
  void ReadSignals();
  void Reap();
  void ReadControl();
  void Obey(const std::string& line);
  int WaitForRest();

  const Options& options_;
  std::vector<pid_t> hosts_ = {getpid()};  // process 1 of each
  std::unique_ptr<Switch> switch_;
  std::vector<int> inputs_;
  int signals_ = -1, control_ = -1;
  std::string control_text_;  // begin of a line
  pid_t command_ = -1;
  int exit_code_ = -1;  // of the command, once it has ended
};

absl::Status Machine::SetUp() {
  ANNULUS_RETURN_IF_ERROR(SetUpFirstHost(options_.hosts));
  for (int host = 1; host < options_.hosts; ++host) {
    ANNULUS_ASSIGN_OR_RETURN(const pid_t process, StartHost(host));
    hosts_.push_back(process);
  }
  std::vector<int> taps;
  for (int host = 0; host < options_.hosts; ++host) {
    ANNULUS_ASSIGN_OR_RETURN(const int tap, OpenTap(host, hosts_[static_cast<size_t>(host)]));
    taps.push_back(tap);
  }
  switch_ = std::make_unique<Switch>(std::move(taps), options_.link);
  const sigset_t watched = WatchedSignals();
  signals_ = signalfd(-1, &watched, SFD_NONBLOCK | SFD_CLOEXEC);
  inputs_ = {signals_};
  if (!options_.control.empty()) {
    if (mkfifo(options_.control.c_str(), 0600) != 0 && errno != EEXIST)
      return FileError("--control", options_.control);
    control_ = open(options_.control.c_str(), O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (control_ < 0) return FileError("--control", options_.control);
    inputs_.push_back(control_);
  }
  return SetEnvironment(options_, hosts_);
}

void Machine::StartCommand() {
  command_ = fork();
  if (command_ != 0) return;
  const sigset_t watched = WatchedSignals();
  sigprocmask(SIG_UNBLOCK, &watched, nullptr);
  std::vector<std::string> words = options_.command;
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  execvp(argv[0], argv.data());
  std::fprintf(stderr, "namespace_hosts: error: %s: %s\n", argv[0], strerror(errno));
  _exit(127);
}

void Machine::ReadSignals() {
  signalfd_siginfo info;
  while (read(signals_, &info, sizeof(info)) == sizeof(info)) {
    if (static_cast<int>(info.ssi_signo) == SIGCHLD)
      Reap();
    else if (command_ > 0)
      kill(command_, static_cast<int>(info.ssi_signo));
  }
}

void Machine::Reap() {
  int status = 0;
  for (pid_t ended; (ended = waitpid(-1, &status, WNOHANG)) > 0;) {
    if (ended == command_) exit_code_ = ExitCodeOf(status);
  }
}

void Machine::ReadControl() {
  char text[256];
  for (ssize_t bytes; control_ >= 0 && (bytes = read(control_, text, sizeof(text))) > 0;)
    control_text_.append(text, static_cast<size_t>(bytes));
  for (size_t end; (end = control_text_.find('\n')) != std::string::npos; control_text_.erase(0, end + 1))
    Obey(control_text_.substr(0, end));
}

void Machine::Obey(const std::string& line) {
  for (int host = 0; host < options_.hosts; ++host) {
    if (line == "cut " + HostName(host)) {
      switch_->wires().Cut(host);
    } else if (line == "mend " + HostName(host)) {
      switch_->wires().Mend(host);
    } else {
      continue;
    }
    std::fprintf(stderr, "namespace_hosts: %s\n", line.c_str());
    return;
  }
  std::fprintf(stderr, "namespace_hosts: error: %s: `%s`: expected `cut HOST` or `mend HOST`\n",
               options_.control.c_str(), line.c_str());
}

// After the command has ended: what it started elsewhere should end by itself.
int Machine::WaitForRest() {
  const int64_t end = MonotonicNanoseconds() + static_cast<int64_t>(options_.grace_seconds * 1e9);
  std::vector<std::string> left;
  while (!(left = ProcessesLeft(hosts_)).empty() && MonotonicNanoseconds() < end) {
    const int64_t look_again = MonotonicNanoseconds() + kNanosecondsPerSecond / 20;
    while (MonotonicNanoseconds() < look_again) {
      switch_->Turn();
      ReadSignals();
      switch_->Wait(inputs_);
    }
  }
  if (left.empty()) return exit_code_;
  std::fprintf(stderr, "namespace_hosts: error: still there %g s after the command's end: %s\n",
               options_.grace_seconds, absl::StrJoin(left, ", ").c_str());
  return exit_code_ != 0 ? exit_code_ : 1;
}

int Machine::Run() {
  setsid();  // of a terminal's signals the parent passes on one
  if (const absl::Status status = SetUp(); !status.ok()) return Fail(status);
  // Ranks that wait keep all cores busy; a switch that came after them would delay what they wait for.
  const sched_param highest{.sched_priority = 1};
  if (sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &highest) != 0)
    std::fprintf(stderr, "namespace_hosts: no real-time priority (%s): delays vary\n", strerror(errno));
  StartCommand();
  while (exit_code_ < 0) {
    switch_->Turn();
    ReadSignals();
    ReadControl();
    if (exit_code_ < 0) switch_->Wait(inputs_);
  }
  return WaitForRest();
}

// Outside of the namespaces: passes signals on and waits for the end.
int Supervise(pid_t machine) {
  const sigset_t watched = WatchedSignals();
  while (true) {
    int signal = 0;
    if (sigwait(&watched, &signal) != 0) continue;
    int status = 0;
    if (signal != SIGCHLD)
      kill(machine, signal);
    else if (waitpid(machine, &status, WNOHANG) == machine)
      return ExitCodeOf(status);
  }
}

int RunHosts(const Options& options) {
  const sigset_t watched = WatchedSignals();
  sigprocmask(SIG_BLOCK, &watched, nullptr);
  const absl::StatusOr<pid_t> machine = ForkMachine();
  if (!machine.ok()) return Fail(machine.status());
  if (*machine == 0) _exit(Machine(options).Run());
  const int exit_code = Supervise(*machine);
  if (!options.control.empty()) unlink(options.control.c_str());
  return exit_code;
}

// In place of ssh: namespace_hosts HOST COMMAND...
int Enter(const std::vector<std::string>& args) {
  const std::vector<std::string> all = absl::StrSplit(std::getenv(kProcesses), ' ');
  for (size_t host = 0; host < all.size(); ++host) {
    if (args[1] != HostName(static_cast<int>(host))) continue;
    const std::vector<std::string> words(args.begin() + 2, args.end());
    const absl::StatusOr<int> exit_code = RunOnHost(std::atoi(all[host].c_str()), absl::StrJoin(words, " "));
    return exit_code.ok() ? *exit_code : Fail(exit_code.status());
  }
  return Fail(Invalid(args[1], ": expected one of ", all.size(), " hosts, host0 the first"));
}

int Main(const std::vector<std::string>& args) {
  if (std::getenv(kProcesses) != nullptr && args.size() > 2 && args[1][0] != '-') return Enter(args);
  const absl::StatusOr<Options> options = ParseOptions({args.begin() + 1, args.end()});
  if (options.ok()) return RunHosts(*options);
  Fail(options.status());
  return 2;
}

}  // namespace
}  // namespace annulus::hosts

int main(int argc, char** argv) { return annulus::hosts::Main({argv, argv + argc}); }
