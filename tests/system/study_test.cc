// A study of 24 points that is killed at a moment drawn anew each time, and started again: it ends, runs no
// finished point twice, and leaves no rank behind.

#include <cstdlib>
#include <map>
#include <random>

#include "annulus/base/random.h"
#include "system/tiny_run.h"

namespace annulus::testing {
namespace {

constexpr size_t kPoints = 24;

constexpr char kStudy[] = R"(name: "tiny"
run: "c.textproto"
set: "optim.sequences_per_step=8"
measure { steps: 2 warm_up: 1 limit_minutes: 1 }
axes {
  ranks_per_host: [1, 2, 4]
  seq_len: [16, 25]
  model { label: "2 layers" set: "model.pattern=(A -)^2" }
  model { label: "1 layer" set: "model.pattern=A -" }
  field { path: "optim.micro_batch" value: ["1", "2"] }
}
)";

// `annulus study` as a user starts it. What it leaves behind becomes a child of the test.
class Study {
 public:
  Study(const std::string& folder, const std::string& log) : log_(folder + "/" + log) {
    ANNULUS_CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
    const std::string program = ThisTree().program;
    pid_ = fork();
    ANNULUS_CHECK(pid_ >= 0);
    if (pid_ > 0) return;
    const int out = open(log_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (out < 0 || dup2(out, 1) < 0 || dup2(out, 2) < 0 || chdir(folder.c_str()) != 0) _exit(126);
    execl(program.c_str(), program.c_str(), "study", "s.textproto", "--out", "out", "--ranks", "4", nullptr);
    _exit(127);
  }

  pid_t pid() const { return pid_; }
  std::string log() const { return Contents(log_); }

  // Whether it ended, with its exit code; -1 if a signal ended it.
  bool Ended() {
    int status = 0;
    if (!ended_ && waitpid(pid_, &status, WNOHANG) == pid_) {
      ended_ = true;
      exit_code_ = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    }
    return ended_;
  }
  int exit_code() const { return exit_code_; }

 private:
  std::string log_;
  pid_t pid_ = -1;
  bool ended_ = false;
  int exit_code_ = -1;
};

bool WaitFor(const std::function<bool()>& condition, double seconds) {
  const auto start = std::chrono::steady_clock::now();
  while (!condition()) {
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds)
      return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

// True once no process that the test has started, however far down, is left.
bool NobodyIsLeft(double seconds) {
  return WaitFor(
      [] {
        pid_t ended;
        while ((ended = waitpid(-1, nullptr, WNOHANG)) > 0) continue;
        return ended < 0 && errno == ECHILD;
      },
      seconds);
}

class StudyTest : public ::testing::Test {
 protected:
  StudyTest() {
    WriteTinyInputs(folder_.path());
    Overwrite(folder_.path() + "/s.textproto", kStudy);
  }

  // result.json of the finished points.
  std::map<std::string, std::string> Finished() const {
    std::map<std::string, std::string> results;
    const absl::StatusOr<std::vector<std::string>> ids = ListDirectory(points_);
    for (const std::string& id : ids.ok() ? *ids : std::vector<std::string>()) {
      const std::string path = absl::StrCat(points_, "/", id, "/result.json");
      if (Exists(path)) results[id] = Contents(path);
    }
    return results;
  }

  size_t RunsOf(const std::string& id) const {
    size_t runs = 0;
    for (const std::string& name : Names(absl::StrCat(points_, "/", id))) {
      runs += absl::StartsWith(name, "run-") && !absl::EndsWith(name, ".log");
    }
    return runs;
  }

  // Every point was measured and predicted, and is in the reports.
  void ExpectWhole() const {
    const auto results = Finished();
    EXPECT_EQ(results.size(), kPoints);
    for (const auto& [id, text] : results) {
      const nlohmann::json json = nlohmann::json::parse(text);
      EXPECT_EQ(json["state"], "done") << text;
      EXPECT_TRUE(json.contains("predicted")) << text;
      ASSERT_TRUE(json.contains("measured")) << text;
      EXPECT_GT(json["measured"]["step_seconds"].get<double>(), 0) << text;
      const auto sent = [&](const char* kind) { return json[kind]["bytes_inside_hosts"].get<double>(); };
      EXPECT_EQ(sent("measured") > 0, json["point"]["ranks"] > 1) << text;
      // What is not predicted: the sums of the loss and of the gradients' squares, a few numbers a rank.
      EXPECT_NEAR(sent("measured"), sent("predicted"), 1024) << text;
      EXPECT_EQ(json["measured"]["bytes_between_hosts"], 0) << text;
    }
    const std::string csv = Contents(folder_.path() + "/out/results.csv");
    for (const auto& [id, text] : results) EXPECT_TRUE(absl::StrContains(csv, id)) << id;
    EXPECT_TRUE(absl::StrContains(Contents(folder_.path() + "/out/report.html"), "</html>"));
  }

  const TemporaryFolder folder_;
  const std::string points_ = folder_.path() + "/out/points";
};

TEST_F(StudyTest, KilledAtAnyMomentItGoesOnWhereItWas) {
  const char* given = std::getenv("ANNULUS_TEST_SEED");
  const uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device()();
  std::printf("seed %llu (ANNULUS_TEST_SEED)\n", static_cast<unsigned long long>(seed));
  const RandomStream random(seed, "kill");
  const size_t kill_after = random.Below(0, kPoints - 6);  // finished points

  Study first(folder_.path(), "first.txt");
  const auto moment = [&] {
    return Exists(folder_.path() + "/out/study.resolved.textproto") && Finished().size() >= kill_after;
  };
  ASSERT_TRUE(WaitFor([&] { return moment() || first.Ended(); }, 150)) << first.log();
  Study second(folder_.path(), "second.txt");
  ASSERT_TRUE(WaitFor([&] { return second.Ended() || first.Ended(); }, 30)) << second.log();
  ASSERT_FALSE(first.Ended()) << first.log();
  EXPECT_EQ(second.exit_code(), 1);
  EXPECT_TRUE(absl::StrContains(second.log(), "--out: expected no other study in it: ")) << second.log();
  std::this_thread::sleep_for(std::chrono::microseconds(random.Below(1, 400'000)));
  ASSERT_FALSE(first.Ended()) << first.log();
  ASSERT_EQ(kill(first.pid(), SIGKILL), 0);
  ASSERT_TRUE(NobodyIsLeft(30)) << "ranks outlive their study";

  const std::map<std::string, std::string> before = Finished();
  EXPECT_GE(before.size(), kill_after);
  std::map<std::string, size_t> runs_before;
  for (const auto& [id, text] : before) runs_before[id] = RunsOf(id);

  Study again(folder_.path(), "again.txt");
  ASSERT_TRUE(WaitFor([&] { return again.Ended(); }, 150)) << again.log();
  EXPECT_EQ(again.exit_code(), 0) << again.log();
  EXPECT_TRUE(absl::StrContains(again.log(),
                                "24 points: 24 measured, 0 simulated alone, 0 failed, 0 refused, 0 open"))
      << again.log();
  ExpectWhole();
  size_t runs = 0;
  for (const auto& [id, text] : Finished()) {
    runs += RunsOf(id);
    if (before.count(id) == 0) continue;
    EXPECT_EQ(text, before.at(id)) << "finished before, and made anew";
    EXPECT_EQ(RunsOf(id), 1u) << id;
  }
  EXPECT_LE(runs, kPoints + 1) << "one was under way when the study was killed";
  ASSERT_TRUE(NobodyIsLeft(10));

  Study last(folder_.path(), "last.txt");
  ASSERT_TRUE(WaitFor([&] { return last.Ended(); }, 60)) << last.log();
  EXPECT_EQ(last.exit_code(), 0) << last.log();
  size_t runs_at_last = 0;
  for (const auto& [id, text] : Finished()) runs_at_last += RunsOf(id);
  EXPECT_EQ(runs_at_last, runs);
}

// A run that cannot be loaded by the ranks themselves: its data are not there.
TEST_F(StudyTest, APointThatFailsIsRecordedWithItsReason) {
  Overwrite(folder_.path() + "/s.textproto",
            "name: \"f\" run: \"c.textproto\" measure { steps: 1 warm_up: 0 } axes { ranks_per_host: [1, 2] "
            "field { path: \"data.train[0].text.path\" value: [\"text.txt\", \"nowhere.txt\"] } }");
  Study study(folder_.path(), "log.txt");
  ASSERT_TRUE(WaitFor([&] { return study.Ended(); }, 60)) << study.log();
  EXPECT_EQ(study.exit_code(), 1) << study.log();
  EXPECT_TRUE(absl::StrContains(study.log(), "\nerror: 2 points failed, ")) << study.log();
  EXPECT_TRUE(
      absl::StrContains(study.log(), "4 points: 2 measured, 0 simulated alone, 2 failed, 0 refused, 0 open"))
      << study.log();
  EXPECT_TRUE(absl::StrContains(study.log(), "FAILED: exit code 1: error: ")) << study.log();
  EXPECT_TRUE(absl::StrContains(study.log(), "nowhere.txt")) << study.log();
}

TEST_F(StudyTest, APointThatTakesTooLongIsEndedWithItsRanks) {
  Overwrite(folder_.path() + "/s.textproto",
            "name: \"f\" run: \"c.textproto\" measure { steps: 1000000 limit_minutes: 0.05 } axes { "
            "ranks_per_host: 2 }");
  Study study(folder_.path(), "log.txt");
  ASSERT_TRUE(WaitFor([&] { return study.Ended(); }, 60)) << study.log();
  EXPECT_EQ(study.exit_code(), 1) << study.log();
  EXPECT_TRUE(absl::StrContains(study.log(), "FAILED: took longer than measure.limit_minutes, 3s: "))
      << study.log();
  EXPECT_TRUE(
      absl::StrContains(study.log(), "\n1 point: 0 measured, 0 simulated alone, 1 failed, 0 refused, 0 open"))
      << study.log();
  EXPECT_TRUE(NobodyIsLeft(0)) << "the study has waited for all of them";
}

}  // namespace
}  // namespace annulus::testing
