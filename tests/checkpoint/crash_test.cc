// A save that is killed, or fails, at any file operation leaves a whole checkpoint: the old or the new one.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdarg>
#include <mutex>
#include <ostream>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_replace.h"
#include "checkpoint/checkpoint_testing.h"

namespace annulus {
namespace {

// The program's own definitions of write(), fsync(), rename() ... below take precedence over the C library's,
// so the code under test is the code that ships. Armed, they count and record, and stop or fail one call.
enum class AtCall {
  kCount,
  kKill,         // SIGKILL to this process in place of the call
  kKillTorn,     // the same, but half of a write reaches the file first
  kNoSpace,      // the call fails with ENOSPC, and only this one
  kNoSpaceLeft,  // every call from this one on that could need space fails with ENOSPC
};

struct FileCalls {
  std::mutex mutex;
  std::atomic<bool> armed = false;
  AtCall action = AtCall::kCount;
  int at = 0;
  std::vector<std::string> log;  // "fsync /path", "rename /from /to"
};

FileCalls& Calls() {
  static auto* const calls = new FileCalls;
  return *calls;
}

void Arm(AtCall action, int at) {
  FileCalls& calls = Calls();
  const std::lock_guard lock(calls.mutex);
  calls.action = action;
  calls.at = at;
  calls.log.clear();
  calls.armed = true;
}

std::vector<std::string> Disarm() {
  FileCalls& calls = Calls();
  const std::lock_guard lock(calls.mutex);
  calls.armed = false;
  return calls.log;
}

std::string PathOf(int fd) {
  char path[4096];
  const ssize_t length = readlink(absl::StrCat("/proc/self/fd/", fd).c_str(), path, sizeof(path));
  return std::string(path, static_cast<size_t>(std::max<ssize_t>(length, 0)));
}

// True if the call is to fail, with errno set. `torn` does part of the call before a kill.
template <typename Torn>
bool Intercept(const std::string& call, Torn torn) {
  FileCalls& calls = Calls();
  const std::lock_guard lock(calls.mutex);
  const int number = static_cast<int>(calls.log.size());
  calls.log.push_back(call);
  const bool frees_space = absl::StartsWith(call, "remove ");
  if (calls.action == AtCall::kNoSpaceLeft ? number >= calls.at && !frees_space
                                           : number == calls.at && calls.action == AtCall::kNoSpace) {
    errno = ENOSPC;
    return true;
  }
  if (number != calls.at || calls.action == AtCall::kCount || calls.action == AtCall::kNoSpaceLeft)
    return false;
  if (calls.action == AtCall::kKillTorn) torn();
  kill(getpid(), SIGKILL);
  return true;
}

bool Intercept(const std::string& call) {
  return Intercept(call, [] {});
}

}  // namespace
}  // namespace annulus

using annulus::Calls;
using annulus::Intercept;
using annulus::PathOf;

extern "C" {

int open(const char* path, int flags, ...) {
  mode_t mode = 0;
  if ((flags & O_CREAT) != 0) {
    va_list arguments;
    va_start(arguments, flags);
    mode = va_arg(arguments, mode_t);
    va_end(arguments);
    if (Calls().armed && Intercept(absl::StrCat("create ", path))) return -1;
  }
  return static_cast<int>(syscall(SYS_openat, AT_FDCWD, path, flags, mode));
}

ssize_t write(int fd, const void* data, size_t bytes) {
  const auto torn = [&] { syscall(SYS_write, fd, data, bytes / 2); };
  if (Calls().armed && Intercept("write " + PathOf(fd), torn)) return -1;
  return syscall(SYS_write, fd, data, bytes);
}

int fsync(int fd) {
  if (Calls().armed && Intercept("fsync " + PathOf(fd))) return -1;
  // What a killed process has written stays in the page cache; waiting for the disk here would show nothing
  // more.
  return fcntl(fd, F_GETFD) < 0 ? -1 : 0;
}

int rename(const char* from, const char* to) noexcept {
  if (Calls().armed && Intercept(absl::StrCat("rename ", from, " ", to))) return -1;
  return static_cast<int>(syscall(SYS_rename, from, to));
}

int mkdir(const char* path, mode_t mode) noexcept {
  if (Calls().armed && Intercept(absl::StrCat("mkdir ", path))) return -1;
  return static_cast<int>(syscall(SYS_mkdir, path, mode));
}

int unlinkat(int directory, const char* path, int flags) noexcept {
  if (Calls().armed &&
      Intercept(absl::StrCat("remove ", directory == AT_FDCWD ? "" : PathOf(directory) + "/", path)))
    return -1;
  return static_cast<int>(syscall(SYS_unlinkat, directory, path, flags));
}

int remove(const char* path) noexcept {
  if (Calls().armed && Intercept(absl::StrCat("remove ", path))) return -1;
  const long rc = syscall(SYS_unlink, path);
  return static_cast<int>(rc != 0 && errno == EISDIR ? syscall(SYS_rmdir, path) : rc);
}

}  // extern "C"

namespace annulus {
namespace {

using testing::Difference;
using testing::Names;
using testing::Sample;
using testing::Save;
using testing::SaveOnRanks;
using testing::TemporaryDirectory;
using Strings = std::vector<std::string>;

// fn in a process of its own; its wait status.
template <typename Fn>
int InChild(Fn fn) {
  const pid_t child = fork();
  ANNULUS_CHECK(child >= 0);
  if (child == 0) {
    fn();
    _exit(0);
  }
  int status = 0;
  ANNULUS_CHECK(waitpid(child, &status, 0) == child);
  return status;
}

bool WasKilled(int status) { return WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL; }

struct Scenario {
  std::string name;
  int64_t before, after;  // salts of the samples, modulo 1000 their steps
  int ranks;
};

void PrintTo(const Scenario& scenario, std::ostream* out) { *out << scenario.name; }

class CrashTest : public ::testing::TestWithParam<Scenario> {
 protected:
  // Either checkpoint is whole; a later save works and leaves nothing else behind.
  static void ExpectOldOrNew(const std::string& directory, const Sample& before, const Sample& after,
                             const std::string& where) {
    const absl::StatusOr<Checkpoint> opened = Checkpoint::Open(directory);
    ASSERT_TRUE(opened.ok()) << where << ": " << opened.status();
    if (Difference(*opened, after) != "") {
      ASSERT_EQ(Difference(*opened, before), "") << where;
    }
    const Sample next(50);
    Save(1, directory, next, 1);
    ASSERT_EQ(Difference(Checkpoint::Open(directory), next), "") << where;
    ASSERT_EQ(Names(directory), (Strings{"LATEST", "step-00000050"})) << where;
  }

  const Sample before_ = Sample(GetParam().before), after_ = Sample(GetParam().after);
};

TEST_P(CrashTest, KilledAtEveryOperation) {
  for (const AtCall action : {AtCall::kKill, AtCall::kKillTorn}) {
    int kills = 0;
    while (true) {
      const TemporaryDirectory directory;
      Save(GetParam().ranks, directory.path(), before_, 1);
      const int status = InChild([&] {
        Arm(action, kills);
        SaveOnRanks(GetParam().ranks, directory.path(), after_, 1);
      });
      ASSERT_NO_FATAL_FAILURE(
          ExpectOldOrNew(directory.path(), before_, after_, absl::StrCat("killed at operation ", kills)));
      if (!WasKilled(status)) break;
      ++kills;
    }
    EXPECT_GE(kills,
              20);  // create, write, fsync of four files, directories, renames, and the old one's removal
  }
}

TEST_P(CrashTest, EveryOperationOutOfSpace) {
  for (const AtCall action : {AtCall::kNoSpace, AtCall::kNoSpaceLeft}) {
    int failures = 0;
    while (true) {
      const std::string where = absl::StrCat("no space at operation ", failures);
      const TemporaryDirectory directory;
      Save(GetParam().ranks, directory.path(), before_, 1);
      Arm(action, failures);
      const std::vector<absl::Status> statuses = SaveOnRanks(GetParam().ranks, directory.path(), after_, 1);
      const bool reached = static_cast<int>(Disarm().size()) > failures;
      for (const absl::Status& status : statuses) {
        EXPECT_EQ(status, statuses[0]) << where;
        EXPECT_TRUE(status.ok() ? !reached || action == AtCall::kNoSpaceLeft
                                : absl::IsResourceExhausted(status))
            << where << ": " << status;
      }
      if (statuses[0].ok()) {
        EXPECT_EQ(Difference(Checkpoint::Open(directory.path()), after_), "") << where;
      }
      ASSERT_NO_FATAL_FAILURE(ExpectOldOrNew(directory.path(), before_, after_, where));
      if (!reached) break;
      ++failures;
    }
    EXPECT_GE(failures, 20);
  }
}

INSTANTIATE_TEST_SUITE_P(Saves, CrashTest,
                         ::testing::Values(Scenario{"next_step", 1, 2, 2}, Scenario{"same_step", 1, 1001, 2},
                                           Scenario{"earlier_step", 3, 2, 1}),
                         [](const auto& info) { return info.param.name; });

// The kill tests cannot see what a power failure would undo; the order of operations can.
TEST(Durability, NothingIsRenamedOrDeletedBeforeWhatItReliesOnIsSynced) {
  const TemporaryDirectory directory;
  Save(2, directory.path(), Sample(1), 1);
  Arm(AtCall::kCount, 0);
  SaveOnRanks(2, directory.path(), Sample(2), 1);
  Strings log = Disarm();
  for (std::string& call : log) call = absl::StrReplaceAll(call, {{directory.path(), "D"}});
  const auto first = [&](const std::string& call) {
    const auto found = std::find(log.begin(), log.end(), call);
    EXPECT_NE(found, log.end()) << call;
    return found - log.begin();
  };
  const auto last = [&](const std::string& call) {
    const auto found = std::find(log.rbegin(), log.rend(), call);
    EXPECT_NE(found, log.rend()) << call;
    return log.rend() - found - 1;
  };

  const std::string tmp = "D/.tmp-step-00000002", commit = tmp + "/COMMIT";
  for (const std::string file : {"/shard-00000.safetensors", "/shard-00001.safetensors", "/manifest.json"}) {
    EXPECT_LT(last("write " + tmp + file), first("fsync " + tmp + file)) << file;
    EXPECT_LT(first("fsync " + tmp + file), first("fsync " + tmp)) << file;
  }
  EXPECT_LT(first("fsync " + tmp), first("create " + commit));
  EXPECT_LT(last("write " + commit), first("fsync " + commit));
  EXPECT_LT(first("fsync " + commit), last("fsync " + tmp));
  const auto committed = first("rename " + tmp + " D/step-00000002");
  EXPECT_LT(last("fsync " + tmp), committed);
  EXPECT_LT(first("fsync D/LATEST.tmp"), committed);
  const auto latest = first("rename D/LATEST.tmp D/LATEST");
  EXPECT_LT(committed, first("fsync D"));
  EXPECT_LT(first("fsync D"), latest);
  EXPECT_LT(latest, last("fsync D"));
  const auto uncommitted = first("remove D/step-00000001/COMMIT");
  EXPECT_LT(last("fsync D"), uncommitted);
  EXPECT_LT(uncommitted, first("fsync D/step-00000001"));
  for (const std::string& call : log)
    if (absl::StartsWith(call, "remove D/step-00000001/") && !absl::EndsWith(call, "COMMIT")) {
      EXPECT_LT(first("fsync D/step-00000001"), first(call));
    }
}

// A limit on file sizes stands in for a full disk that takes part of a write: write() is short, then fails.
TEST(FullDisk, EveryRankReturnsTheErrorAndOldCheckpointsStay) {
  const TemporaryDirectory directory;
  const Sample before(1);
  Save(2, directory.path(), before, 2);
  for (const rlim_t limit : {0, 7, 100, 500}) {
    const int status = InChild([&] {
      signal(SIGXFSZ, SIG_IGN);
      const rlimit file_size{limit, limit};
      if (setrlimit(RLIMIT_FSIZE, &file_size) != 0) _exit(2);
      for (const absl::Status& saved : SaveOnRanks(3, directory.path(), Sample(2), 2))
        if (!absl::IsResourceExhausted(saved) || !absl::StrContains(saved.message(), directory.path()))
          _exit(3);
    });
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0)
        << "limit " << limit << ": wait status " << status;
    EXPECT_EQ(Difference(Checkpoint::Open(directory.path()), before), "") << "limit " << limit;
    EXPECT_EQ(Names(directory.path()), (Strings{"LATEST", "step-00000001"})) << "limit " << limit;
  }
  Save(3, directory.path(), Sample(2), 2);
  EXPECT_EQ(Difference(Checkpoint::Open(directory.path()), Sample(2)), "");
}

// Kills at moments that no count chooses, also between and inside system calls.
TEST(RandomKills, WhatIsOpenedIsAlwaysWholeAndNeverOlder) {
  const TemporaryDirectory directory;
  Save(2, directory.path(), Sample(1), 2);
  int64_t newest = 1;
  std::set<int64_t> seen;
  const RandomStream random(1, "kills");
  for (uint64_t i = 0; i < 20; ++i) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      for (int64_t step = newest + 1;; ++step) SaveOnRanks(2, directory.path(), Sample(step), 2);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(1000 + random.Below(i, 40'000)));
    ASSERT_EQ(kill(child, SIGKILL), 0);
    ASSERT_EQ(waitpid(child, nullptr, 0), child);
    const absl::StatusOr<Checkpoint> opened = Checkpoint::Open(directory.path());
    ASSERT_TRUE(opened.ok()) << opened.status();
    ASSERT_EQ(Difference(*opened, Sample(opened->meta().step)), "");
    ASSERT_GE(opened->meta().step, newest);
    newest = opened->meta().step;
    seen.insert(newest);
  }
  EXPECT_GE(seen.size(), 3u);
}

}  // namespace
}  // namespace annulus
