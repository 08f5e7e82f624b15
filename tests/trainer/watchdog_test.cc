#include "annulus/train/watchdog.h"

#include <gtest/gtest.h>
#include <unistd.h>

namespace annulus {
namespace {

using std::chrono::milliseconds;

void Sleep(milliseconds time) { std::this_thread::sleep_for(time); }

// One rank of a group whose health and abort the test decides.
class Patient : public CommBackend {
 public:
  enum class OnAbort { kReturn, kHang };
  Patient(absl::Status health, OnAbort on_abort) : health_(std::move(health)), on_abort_(on_abort) {}
  int rank() const override { return 0; }
  int size() const override { return 1; }
  absl::StatusOr<Request> Send(ConstTensorRef, int, int) override { return Request(); }
  absl::StatusOr<Request> Receive(TensorRef, int, int) override { return Request(); }
  absl::StatusOr<Request> AllReduce(TensorRef, ReduceOp) override { return Request(); }
  absl::StatusOr<Request> ReduceScatter(ConstTensorRef, TensorRef) override { return Request(); }
  absl::StatusOr<Request> AllGather(ConstTensorRef, TensorRef) override { return Request(); }
  absl::StatusOr<Request> Broadcast(TensorRef, int) override { return Request(); }
  absl::StatusOr<std::shared_ptr<CommBackend>> Split(int, int) override {
    return absl::UnimplementedError("Split");
  }
  absl::Status Health() override { return health_; }
  void Abort() override {
    constexpr char kText[] = "given up\n";
    EXPECT_EQ(write(STDERR_FILENO, kText, sizeof(kText) - 1), static_cast<ssize_t>(sizeof(kText) - 1));
    while (on_abort_ == OnAbort::kHang) Sleep(milliseconds(1000));
  }

 private:
  const absl::Status health_;
  const OnAbort on_abort_;
};

Communicator Group(absl::Status health, Patient::OnAbort on_abort = Patient::OnAbort::kReturn) {
  return Communicator(std::make_shared<Patient>(std::move(health), on_abort));
}

// A rank that begins its work, makes `beats` steps of 50 ms and then hangs.
void HangAfter(int beats, Watchdog::Options options) {
  FlightRecorder recorder(Device{});
  recorder.BeginStep(41);
  recorder.Note("compute", "layer 2 forward", nullptr);
  options.recorder = &recorder;
  Watchdog watchdog(std::move(options));
  for (int i = 0; i < beats; ++i) {
    Sleep(milliseconds(50));
    watchdog.Beat();
  }
  recorder.BeginStep(42);
  recorder.Note("compute", "layer 3 backward", nullptr);
  recorder.Note("collectives dp_cp", "all-reduce f32 [7]", nullptr);
  Sleep(std::chrono::seconds(60));
}

// The whole report, in the order of its lines.
constexpr char kReport[] =
    "rank 5: no progress for .* s in step 42\n"
    ".*rank 5:   collectives dp_cp: .*waits for `all-reduce f32 .7.`\n"
    ".*rank 5:   compute: finished `layer 2 forward`, waits for `layer 3 backward`\n"
    "given up\n";

TEST(WatchdogDeathTest, NamesRankStepAndLanes) {
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EXIT(HangAfter(0, {.deadline_seconds = 0.3, .world_rank = 5, .watched = {Group(absl::OkStatus())}}),
              ::testing::ExitedWithCode(kWatchdogExitCode), kReport);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(30));
}

// 30 steps of 50 ms with a deadline of 1 s: the report is of the hang behind them.
TEST(WatchdogDeathTest, BeatsPutTheDeadlineOff) {
  EXPECT_EXIT(HangAfter(30, {.deadline_seconds = 1, .world_rank = 5, .watched = {Group(absl::OkStatus())}}),
              ::testing::ExitedWithCode(kWatchdogExitCode), kReport);
}

TEST(WatchdogDeathTest, AnErrorOfACommunicatorEndsTheJobBeforeTheDeadline) {
  EXPECT_EXIT(HangAfter(0, {.deadline_seconds = 1000,
                            .world_rank = 1,
                            .watched = {Group(absl::OkStatus()), Group(absl::InternalError("link down"))}}),
              ::testing::ExitedWithCode(kWatchdogExitCode),
              "rank 1: INTERNAL: link down in step 4[12]\n(.*\n)*given up\n");
}

TEST(WatchdogDeathTest, AnAbortThatHangsDoesNotKeepTheProcess) {
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EXIT(HangAfter(0, {.deadline_seconds = 0.3,
                            .world_rank = 5,
                            .watched = {Group(absl::OkStatus(), Patient::OnAbort::kHang)}}),
              ::testing::ExitedWithCode(kWatchdogExitCode), kReport);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(30));
}

// What has no steps progresses by what it notes; it hangs when it notes nothing.
TEST(WatchdogDeathTest, NotesPutTheDeadlineOffWhereReportsAreProgress) {
  const auto measure = [] {
    FlightRecorder recorder(Device{});
    recorder.Note("measurement", "run 0", nullptr);
    const Watchdog watchdog(
        {.deadline_seconds = 1, .progress = Progress::kReports, .world_rank = 3, .recorder = &recorder});
    for (int run = 1; run <= 30; ++run) {
      Sleep(milliseconds(50));
      recorder.Note("measurement", absl::StrCat("run ", run), nullptr);
    }
    Sleep(std::chrono::seconds(60));
  };
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EXIT(measure(), ::testing::ExitedWithCode(kWatchdogExitCode),
              "rank 3: no progress for [0-9.]* s\n"
              ".*rank 3:   measurement: finished `run 29`, waits for `run 30`\n");
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(30));
}

// Ends with 0 though many intervals and more time than the deadline pass.
TEST(WatchdogDeathTest, LeavesAJobThatProgressesAlone) {
  EXPECT_EXIT(
      {
        {
          FlightRecorder recorder(Device{});
          Watchdog watchdog(
              {.deadline_seconds = 1, .watched = {Group(absl::OkStatus())}, .recorder = &recorder});
          for (int i = 0; i < 30; ++i) {
            Sleep(milliseconds(50));
            watchdog.Beat();
          }
        }
        _exit(0);
      },
      ::testing::ExitedWithCode(0), "^$");
}

}  // namespace
}  // namespace annulus
