// Jobs over several hosts made of this one, with shaped links: what they learn is what one host learns, and
// a link that is cut ends them with a message that says who waited for whom. These tests need root and
// /dev/net/tun, and fail without: that jobs over several hosts work is not known there.

#include <cstdlib>

#include "absl/strings/numbers.h"
#include "annulus/train/profile.h"
#include "system/tiny_run.h"

namespace annulus::testing {
namespace {

using Words = std::vector<std::string>;

std::string HostsProgram() {
  return std::filesystem::path(ThisTree().program).replace_filename("namespace_hosts").string();
}

Words Hosts(int hosts, int slots, const Words& options = {}) {
  Words words = {HostsProgram(), "--hosts", absl::StrCat(hosts), "--slots", absl::StrCat(slots)};
  words.insert(words.end(), options.begin(), options.end());
  words.push_back("--");
  return words;
}

class HostsTest : public ::testing::Test {
 protected:
  HostsTest() { WriteTinyInputs(folder_.path()); }

  // `text` by a shell on host0, where $ENTER runs programs on other hosts.
  JobResult Shell(const Words& hosts, const std::string& text, double seconds = 30) const {
    const std::string script = absl::StrCat("ENTER=", HostsProgram(), "\n", text);
    return RunJob({.folder = folder_.path(), .under = hosts, .command = {"bash", "-c", script}}, seconds);
  }
  JobSpec Train(const Words& hosts, const std::string& run, const Words& overrides) const {
    JobSpec spec = TrainJob(folder_.path(), 4, run, overrides);
    spec.under = hosts;
    return spec;
  }
  std::string At(const std::string& name) const { return folder_.path() + "/" + name; }

  const TemporaryFolder folder_;
  const Words mesh_ = {"parallel.dp=2", "parallel.cp=2"};
};

TEST_F(HostsTest, HaveNamesProcessesAndSharedMemoryOfTheirOwn) {
  const JobResult result = Shell(Hosts(3, 1), R"(
      hostname; $ENTER host2 hostname
      touch /dev/shm/of_host0; $ENTER host1 'test -e /dev/shm/of_host0 || echo apart'
      sleep 100 & $ENTER host1 'grep -sl sleep /proc/[0-9]*/comm || echo alone'
      $ENTER host1 'exit 7'; echo code $?
      kill $!)");
  EXPECT_TRUE(result.in_time && result.exit_code == 0) << result;
  EXPECT_EQ(result.out, "host0\nhost2\napart\nalone\ncode 7\n") << result;
}

// A refused connection takes one round trip.
TEST_F(HostsTest, ADelayIsThatOfTheRoundTrip) {
  const JobResult result = Shell(Hosts(2, 1, {"--delay", "20ms"}), R"(
      for i in 1 2 3 4 5; do
        begin=${EPOCHREALTIME/./}; (: >/dev/tcp/host1/9) 2>/dev/null; echo $((${EPOCHREALTIME/./} - begin))
      done | sort -n | head -n 1)");
  int64_t microseconds = 0;
  ASSERT_TRUE(absl::SimpleAtoi(result.out, &microseconds)) << result;
  EXPECT_GE(microseconds, 40'000);
  EXPECT_LE(microseconds, 60'000);
}

TEST_F(HostsTest, MessagesBetweenHostsKeepToTheRate) {
  JobSpec spec{.folder = folder_.path(),
               .ranks = 2,
               .arguments = {"bench", "exchange", "--json", "--bytes", "100000", "--repeats", "3", "--set",
                             "device=CPU"},
               .under = Hosts(2, 1, {"--rate", "80mbit"})};
  const JobResult result = RunJob(spec);
  const auto json = nlohmann::json::parse(result.out, nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(json.is_object()) << result;
  EXPECT_LE(json["one_way_gb_per_second"].get<double>(), 0.0101)
      << result;  // 1%: what sockets hold at the end
  EXPECT_GE(json["one_way_gb_per_second"].get<double>(), 0.006) << result;
}

// Rates inside hosts and between them, and a step that is predicted by both.
TEST_F(HostsTest, CalibratesLinksInsideHostsAndThoseBetween) {
  JobSpec calibrate{.folder = folder_.path(),
                    .ranks = 4,
                    .arguments = {"calibrate", "--out", "machine.textproto", "--seconds", "0.001", "--heads",
                                  "2", "--kv_heads", "1", "--head_dim", "8", "--set", "device=CPU"},
                    .under = Hosts(2, 2, {"--rate", "200mbit", "--delay", "1ms"})};
  ExpectDone(RunJob(calibrate, 120));
  const auto profile = ParseProfile("machine", Contents(At("machine.textproto")));
  ASSERT_TRUE(profile.ok()) << profile.status();
  EXPECT_EQ(profile->network.ranks_per_host, 2);
  ASSERT_EQ(profile->links.size(), 1u);
  ASSERT_EQ(profile->network.links.size(), 1u);
  const LinkRate &inside = profile->links[0], &between = profile->network.links[0];
  EXPECT_GE(between.message_seconds, 1e-3) << "the delay that was asked for";
  EXPECT_LT(inside.message_seconds, 1e-3);
  for (const double rate : {between.one_way.back().per_second, profile->network.host_bytes_per_second}) {
    EXPECT_LE(rate, 2.63e7) << "what sockets hold at the end of what is timed";
    EXPECT_GE(rate, 1e7);
  }
  EXPECT_GT(inside.one_way.back().per_second, 6e7);
  EXPECT_LE(profile->network.collectives.back().per_second, 2.63e7);
  EXPECT_GE(profile->network.collectives.back().per_second, 5e6);
  EXPECT_GT(profile->collectives.back().per_second, 6e7);
  JobSpec plan{.folder = folder_.path(),
               .ranks = 1,
               .arguments = {"plan", "c.textproto", "--json", "--set", "parallel.dp=2", "--set",
                             "parallel.cp=2", "--set", "parallel.exchange.profile=machine.textproto"}};
  const JobResult planned = RunJob(plan);
  const auto json = nlohmann::json::parse(planned.out, nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(json.is_object()) << planned;
  const auto& step = json["predicted_step"];
  EXPECT_GT(step["bytes_inside_hosts"].get<int64_t>(), 0);
  EXPECT_GT(step["bytes_between_hosts"].get<int64_t>(), 0);
  EXPECT_GE(step["exposed_gradients_seconds"].get<double>(), 6e-3) << "three sums of numbers, up and down";
}

TEST_F(HostsTest, RanksOfOneHostShareMemoryAndThoseOfTwoDoNot) {
  const JobResult result =
      Shell(Hosts(2, 2), absl::StrCat(ThisTree().files, "/launch/mpirun -n 4 ", ThisTree().program,
                                      R"( bench exchange --bytes 524288 --repeats 3 --set device=CPU >&2 &
      while kill -0 $! 2>/dev/null; do
        ls /dev/shm; $ENTER host1 'ls /dev/shm' | sed 's/^/other /'; sleep 0.1
      done | sort -u; wait $!)"));
  EXPECT_TRUE(result.in_time && result.exit_code == 0) << result;
  EXPECT_TRUE(absl::StrContains(result.out, "\nvader_segment.host0.")) << result;
  EXPECT_TRUE(absl::StrContains(result.out, "other vader_segment.host1.")) << result;
  EXPECT_FALSE(absl::StrContains(result.out, "\nvader_segment.host1.")) << result;
  EXPECT_FALSE(absl::StrContains(result.out, "other vader_segment.host0.")) << result;
}

TEST_F(HostsTest, TrainingIsThatOfOneHostBitForBit) {
  ExpectDone(RunJob(Train({}, "one", mesh_)));
  const Words shaped = {"--rate", "1gbit", "--delay", "200us", "--loss", "0.5%"};
  ExpectDone(RunJob(Train(Hosts(2, 2, shaped), "two", mesh_)));
  ExpectDone(RunJob(Train(Hosts(4, 1), "four", mesh_)));
  for (const char* run : {"two", "four"}) {
    EXPECT_EQ(MetricsDifference(At(run), At("one"), 0), "") << run;
    EXPECT_EQ(CheckpointDifference(At(run), At("one")), "") << run;
  }
}

class CutTest : public HostsTest {
 protected:
  // Trains over two hosts until the link of the second is cut.
  JobResult CutWhileTraining(const std::string& deadline) const {
    Words overrides = mesh_;
    overrides.insert(overrides.end(), {"optim.steps=100000", "eval.every_steps=0", deadline});
    Job job(Train(Hosts(2, 2, {"--control", At("control")}), "run", overrides));
    EXPECT_TRUE(job.WaitWhileRunning([this] { return LastStep(At("run")) >= 5; }, 30)) << job.Wait(0);
    std::ofstream(At("control")) << "cut host1\n";
    const JobResult result = job.Wait(60);
    EXPECT_TRUE(result.in_time) << result;
    EXPECT_NE(result.exit_code, 0) << result;
    EXPECT_FALSE(absl::StrContains(result.err, "still there")) << result;
    return result;
  }
};

// Only the ranks of host0 can still be heard.
TEST_F(CutTest, TheWatchdogSaysWhoWaitedForWhom) {
  const JobResult result = CutWhileTraining("step_deadline_seconds=3");
  EXPECT_TRUE(absl::StrContains(result.err, "watchdog: rank 0: no progress for 3")) << result;
  EXPECT_TRUE(absl::StrContains(result.err, "rank 0:   on host0: waits for messages of")) << result;
  EXPECT_TRUE(absl::StrContains(result.err, "rank 2 on host1")) << result;
}

TEST_F(CutTest, MpirunNoticesBeforeALongDeadline) {
  setenv("OMPI_MCA_oob_tcp_keepalive_time", "1", 1);
  setenv("OMPI_MCA_oob_tcp_keepalive_intvl", "1", 1);
  setenv("OMPI_MCA_oob_tcp_keepalive_probes", "2", 1);
  const JobResult result = CutWhileTraining("step_deadline_seconds=600");
  for (const char* name : {"time", "intvl", "probes"})
    unsetenv(absl::StrCat("OMPI_MCA_oob_tcp_keepalive_", name).c_str());
  EXPECT_TRUE(absl::StrContains(result.err, "lost communication with a remote daemon")) << result;
  EXPECT_TRUE(absl::StrContains(result.err, "on node host1")) << result;
  EXPECT_TRUE(absl::StrContains(result.err, "rank 0: told to end (SIGTERM) in step")) << result;
}

TEST_F(HostsTest, KillingItTakesAllAlong) {
  Job job(
      {.folder = folder_.path(),
       .under = Hosts(2, 1),
       .command = {"bash", "-c", HostsProgram() + " host1 'sleep 1000' & sleep 0.5; echo started; wait"}});
  ASSERT_TRUE(job.WaitWhileRunning([this] { return Contents(At("out.txt")) == "started\n"; }, 20))
      << job.Wait(0);
  job.SignalMpirun(SIGKILL);
  EXPECT_TRUE(job.Wait(5).in_time);
}

TEST_F(HostsTest, WhatACommandLeavesBehindIsAnError) {
  const JobResult result =
      Shell(Hosts(2, 1, {"--grace", "100ms"}), "$ENTER host1 'sleep 1000 >/dev/null 2>&1 &'");
  EXPECT_TRUE(result.in_time) << result;
  EXPECT_EQ(result.exit_code, 1) << result;
  EXPECT_TRUE(absl::StrContains(result.err, "still there 0.1 s after the command's end: sleep (")) << result;
  EXPECT_TRUE(absl::StrContains(result.err, ") on host1")) << result;
}

}  // namespace
}  // namespace annulus::testing
