#include "annulus/train/watchdog.h"

#include <unistd.h>

#include <future>
#include <memory>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "annulus/base/host.h"
#include "annulus/comm/awaited.h"

namespace annulus {
namespace {

constexpr auto kInterval = std::chrono::milliseconds(100);
// Ranks see the end of the deadline, or an error, at different times: the first to end ends the job.
constexpr auto kForOthersToReport = std::chrono::seconds(2);
constexpr auto kForAborting = std::chrono::seconds(3);

// In one call, so that lines of several ranks mix as little as possible.
void WriteToStderr(const std::string& text) {
  const char* data = text.data();
  for (size_t left = text.size(); left > 0;) {
    const ssize_t written = write(STDERR_FILENO, data, left);
    if (written <= 0) return;
    data += written;
    left -= static_cast<size_t>(written);
  }
}

// Aborting waits for the device, which may never answer; then its thread is left behind.
void AbortAll(std::vector<Communicator> communicators, std::vector<ExchangeTransport*> exchanges) {
  auto done = std::make_shared<std::promise<void>>();
  std::future<void> aborted = done->get_future();
  std::thread([communicators = std::move(communicators), exchanges = std::move(exchanges), done]() mutable {
    for (ExchangeTransport* exchange : exchanges) exchange->Abort();
    for (Communicator& communicator : communicators) communicator.Abort();
    done->set_value();
  }).detach();
  aborted.wait_for(kForAborting);
}

}  // namespace

Watchdog::Watchdog(Options options)
    : options_(std::move(options)), last_beat_(Clock::now().time_since_epoch().count()) {
  ANNULUS_CHECK(options_.deadline_seconds > 0) << options_.deadline_seconds;
  ANNULUS_CHECK(options_.recorder != nullptr);
  thread_ = std::thread([this] { Watch(); });
}

Watchdog::~Watchdog() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  stop_requested_.notify_one();
  thread_.join();
}

void Watchdog::Watch() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_requested_.wait_for(lock, kInterval, [this] { return stop_; })) {
    if (options_.progress == Progress::kReports) BeatIfReportChanged();
    const std::string trouble = Trouble();
    if (!trouble.empty()) EndJob(trouble);
  }
}

void Watchdog::BeatIfReportChanged() {
  std::string report = options_.recorder->Report();
  if (report != last_report_) Beat();
  last_report_ = std::move(report);
}

std::string Watchdog::Trouble() const {
  for (const Communicator& communicator : options_.watched) {
    const absl::Status health = communicator.Health();
    if (!health.ok()) return health.ToString();
  }
  for (ExchangeTransport* exchange : options_.exchanges) {
    const absl::Status health = exchange->Health();
    if (!health.ok()) return health.ToString();
  }
  const Clock::duration since = Clock::now().time_since_epoch() - Clock::duration(last_beat_.load());
  const double seconds = std::chrono::duration<double>(since).count();
  if (seconds <= options_.deadline_seconds) return "";
  return absl::StrFormat("no progress for %.1f s", seconds);
}

void Watchdog::EndJob(const std::string& trouble) {
  const int64_t step = options_.recorder->step();  // 0: there are none, or it is before the first
  std::string text = absl::StrCat("annulus: watchdog: rank ", options_.world_rank, ": ", trouble,
                                  step > 0 ? absl::StrCat(" in step ", step) : "", "\n");
  const std::string awaited = AwaitedRanks();
  if (!awaited.empty()) {
    absl::StrAppend(&text, "annulus: watchdog: rank ", options_.world_rank, ":   on ", HostName(),
                    ": waits for messages of ", awaited, "\n");
  }
  const std::string report = options_.recorder->Report();
  bool is_lane = false;  // the first line is the step
  for (const absl::string_view line : absl::StrSplit(report, '\n')) {
    if (is_lane) absl::StrAppend(&text, "annulus: watchdog: rank ", options_.world_rank, ":   ", line, "\n");
    is_lane = true;
  }
  WriteToStderr(text);
  std::this_thread::sleep_for(kForOthersToReport);
  AbortAll(options_.watched, options_.exchanges);
  // Not exit(): destructors would wait for the device and for other ranks.
  _exit(kWatchdogExitCode);
}

}  // namespace annulus
