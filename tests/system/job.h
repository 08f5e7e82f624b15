#pragma once

// A training job as a user starts it: launch/mpirun and the program, with a deadline, and nothing left
// behind.
//
//   const TemporaryFolder folder;
//   Job job({.folder = folder.path(), .ranks = 2, .arguments = {"train", "c.textproto"}});
//   const JobResult result = job.Wait(20);  // ends the job by force if it takes longer
//
// One job at a time in a process: all descendants of the test belong to it.

#include <dirent.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "annulus/base/check.h"
#include "annulus/base/file.h"

namespace annulus::testing {

class TemporaryFolder {
 public:
  TemporaryFolder() {
    path_ = ::testing::TempDir() + "annulus_system_XXXXXX";
    ANNULUS_CHECK(mkdtemp(path_.data()) != nullptr) << path_;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline std::string Contents(const std::string& path) {
  absl::StatusOr<std::string> text = ReadFile(path);
  return text.ok() ? *std::move(text) : "";
}

inline void Overwrite(const std::string& path, const std::string& contents) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(contents.data(), static_cast<std::streamsize>(contents.size()));
  file.close();
  ANNULUS_CHECK(file.good()) << path;
}

// Where the program and what it needs lie: in the installed tree whose tests/ holds this test, else in the
// build and the sources.
struct ProgramTree {
  std::string program;  // annulus
  std::string files;    // folder of launch/ and examples/
};
inline ProgramTree ThisTree() {
  const std::filesystem::path test = std::filesystem::read_symlink("/proc/self/exe");
  const std::filesystem::path installed = test.parent_path().parent_path();
  if (std::filesystem::exists(installed / "bin/annulus")) return {installed / "bin/annulus", installed};
  return {ANNULUS_BINARY_DIR "/annulus", ANNULUS_SOURCE_DIR};
}

struct JobSpec {
  std::string folder;  // working directory; out.txt and err.txt are written there
  int ranks = 1;
  std::vector<std::string> arguments = {};  // of the program
  std::vector<std::string> under = {};      // what launch/mpirun is run by, its arguments before it
  std::vector<std::string> command = {};    // in place of launch/mpirun and the program
};

struct JobResult {
  bool in_time = false;  // every process ended by itself before the deadline
  int exit_code = -1;    // of mpirun; -1 if it was ended by a signal
  double seconds = 0;
  std::string out, err;
};

inline std::ostream& operator<<(std::ostream& os, const JobResult& result) {
  return os << "exit code " << result.exit_code << " after " << result.seconds << " s"
            << (result.in_time ? "" : ", by force") << "\n---- stdout ----\n"
            << result.out << "\n---- stderr ----\n"
            << result.err;
}

class Job {
 public:
  explicit Job(const JobSpec& spec) : folder_(spec.folder) {
    // Ranks that outlive mpirun become children of the test: it sees them, and can end them.
    ANNULUS_CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
    const ProgramTree tree = ThisTree();
    std::vector<std::string> job = {tree.files + "/launch/mpirun", "-n", absl::StrCat(spec.ranks),
                                    tree.program};
    job.insert(job.end(), spec.arguments.begin(), spec.arguments.end());
    const std::vector<std::string>& last = spec.command.empty() ? job : spec.command;
    std::vector<std::string> words = spec.under;
    words.insert(words.end(), last.begin(), last.end());
    for (const char* file : {"/out.txt", "/err.txt"}) Overwrite(folder_ + file, "");  // not the last job's
    mpirun_ = fork();
    ANNULUS_CHECK(mpirun_ >= 0) << "fork: errno " << errno;
    if (mpirun_ == 0) Execute(words);
  }
  ~Job() { EndByForce(); }
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  // True while any process of the job is there.
  bool Running() {
    int status = 0;
    pid_t ended;
    while ((ended = waitpid(-1, &status, WNOHANG)) > 0) {
      if (ended == mpirun_) exit_code_ = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    }
    return ended == 0;
  }

  // Waits for the end of every process.
  JobResult Wait(double seconds) {
    const bool in_time = WaitUntil([this] { return !Running(); }, seconds);
    if (!in_time) EndByForce();
    return {.in_time = in_time,
            .exit_code = exit_code_,
            .seconds = Seconds(),
            .out = Contents(folder_ + "/out.txt"),
            .err = Contents(folder_ + "/err.txt")};
  }

  // True once `condition` holds; false when it does not within `seconds`, or the job ended before.
  bool WaitWhileRunning(const std::function<bool()>& condition, double seconds) {
    bool holds = false;
    WaitUntil([&] { return (holds = condition()) || !Running(); }, seconds);
    return holds;
  }

  void SignalMpirun(int signal) const { kill(mpirun_, signal); }

  // Processes of the ranks, in rank order: mpirun starts them one after the other.
  std::vector<pid_t> RankProcesses() const { return ChildrenOf(mpirun_, "annulus"); }

 private:
  [[noreturn]] void Execute(const std::vector<std::string>& words) const {
    prctl(PR_SET_PDEATHSIG, SIGTERM);  // a test that is killed takes its job along
    const int in = open("/dev/null", O_RDONLY);
    const int out = open((folder_ + "/out.txt").c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    const int err = open((folder_ + "/err.txt").c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    const bool ready = in >= 0 && dup2(in, 0) == 0 && dup2(out, 1) == 1 && dup2(err, 2) == 2;
    if (!ready || chdir(folder_.c_str()) != 0) _exit(126);
    std::vector<char*> argv;
    for (const std::string& word : words) argv.push_back(const_cast<char*>(word.c_str()));
    argv.push_back(nullptr);
    execv(argv[0], argv.data());
    _exit(127);
  }

  static bool WaitUntil(const std::function<bool()>& condition, double seconds) {
    const auto start = std::chrono::steady_clock::now();
    while (!condition()) {
      if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds)
        return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return true;
  }

  double Seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

  // Children of `parent`, of the given program (any if empty), in order of process id.
  static std::vector<pid_t> ChildrenOf(pid_t parent, const std::string& program) {
    std::vector<pid_t> found;
    DIR* proc = opendir("/proc");
    ANNULUS_CHECK(proc != nullptr);
    while (const dirent* entry = readdir(proc)) {
      const pid_t pid = static_cast<pid_t>(std::atoi(entry->d_name));
      if (pid <= 0) continue;
      // "pid (program) state parent ..."
      const std::string stat = Contents(absl::StrCat("/proc/", pid, "/stat"));
      const size_t open = stat.find('('), close = stat.rfind(')');
      if (close == std::string::npos || close + 4 > stat.size()) continue;
      if (std::atoi(stat.c_str() + close + 4) != parent) continue;
      if (program.empty() || stat.substr(open + 1, close - open - 1) == program) found.push_back(pid);
    }
    closedir(proc);
    std::sort(found.begin(), found.end());
    return found;
  }

  // mpirun first: its ranks then become children of this process, and are ended in the next round.
  void EndByForce() {
    while (Running()) {
      for (const pid_t pid : ChildrenOf(getpid(), "")) kill(pid, SIGKILL);
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }

  std::string folder_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  pid_t mpirun_ = -1;
  int exit_code_ = -1;
};

inline JobResult RunJob(const JobSpec& spec, double seconds = 60) { return Job(spec).Wait(seconds); }

// Lines of standard error that report an error of the program.
inline std::vector<std::string> ErrorLines(const JobResult& result) {
  std::vector<std::string> errors;
  for (const absl::string_view line : absl::StrSplit(result.err, '\n')) {
    if (absl::StartsWith(line, "error:")) errors.emplace_back(line);
  }
  return errors;
}

}  // namespace annulus::testing
