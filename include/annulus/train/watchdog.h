#pragma once

// Ends a job that hangs. A thread of its own looks at the communicators' health and at the time since the
// last Beat, or since its report changed. On an error, or when the deadline has passed, it says on stderr
// which rank was doing what in which step, gives the other ranks time to say the same, gives up what is under
// way and ends the process with kWatchdogExitCode, so that mpirun ends the job. The last checkpoint is whole
// at any time.
//
//   Watchdog watchdog({.deadline_seconds = 600, .world_rank = world.rank(),
//                      .watched = {mesh.cp, mesh.dp_cp}, .recorder = &ctx.recorder});
//   for (...) { trainer.Step(...); watchdog.Beat(); }

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "annulus/comm/communicator.h"
#include "annulus/comm/exchange_transport.h"
#include "annulus/device/flight_recorder.h"

namespace annulus {

inline constexpr int kWatchdogExitCode = 75;  // EX_TEMPFAIL of sysexits.h: starting again may help

// What puts the deadline off.
enum class Progress {
  kBeats,
  kReports,  // also work that begins or ends, by the recorder's report: for what has no steps, since a rank
             // that waits for another soon begins nothing any more
};

class Watchdog {
 public:
  struct Options {
    double deadline_seconds = 0;  // without progress; positive
    Progress progress = Progress::kBeats;
    int world_rank = 0;
    std::vector<Communicator> watched = {};
    std::vector<ExchangeTransport*> exchanges = {};  // watched too; outlive the watchdog
    const FlightRecorder* recorder = nullptr;        // outlives the watchdog
  };
  explicit Watchdog(Options options);
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;
  ~Watchdog();

  // Progress was made. From any thread.
  void Beat() { last_beat_ = Clock::now().time_since_epoch().count(); }

 private:
  using Clock = std::chrono::steady_clock;

  void Watch();
  void BeatIfReportChanged();
  // What is wrong, in words; empty if nothing is.
  std::string Trouble() const;
  [[noreturn]] void EndJob(const std::string& trouble);

  const Options options_;
  std::atomic<Clock::rep> last_beat_;
  std::string last_report_;  // of the recorder; of kReports
  std::mutex mutex_;
  std::condition_variable stop_requested_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace annulus
