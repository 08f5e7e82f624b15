#include "annulus/device/flight_recorder.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu_memory.h"

namespace annulus {

// Every call into CUDA is made without the mutex: it may block while the device hangs, and a report may not.
void FlightRecorder::Note(const std::string& lane, std::string what, StreamHandle stream) {
  uint32_t* finished = stream == nullptr ? nullptr : FinishedOf(lane);
  uint32_t noted = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    Lane& now = lanes_[lane];
    if (now.names.size() == kKept) now.names.pop_front();
    now.names.push_back(std::move(what));
    noted = ++now.noted;
  }
  if (finished != nullptr) EnqueueWrite(finished, noted, stream);
}

// Where the lane's stream writes; taken at its first Note.
uint32_t* FlightRecorder::FinishedOf(const std::string& lane) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = lanes_.find(lane);
    if (found != lanes_.end()) return static_cast<uint32_t*>(found->second.finished.data());
  }
  PinnedBuffer memory(device_, sizeof(uint32_t));
  uint32_t* finished = static_cast<uint32_t*>(memory.data());
  *finished = 0;
  const std::lock_guard<std::mutex> lock(mutex_);
  lanes_[lane].finished = std::move(memory);
  return finished;
}

void FlightRecorder::BeginStep(int64_t step) {
  const std::lock_guard<std::mutex> lock(mutex_);
  step_ = step;
}

int64_t FlightRecorder::step() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return step_;
}

// How many of the lane's newest entries have not ended.
size_t FlightRecorder::Unfinished(const Lane& lane) {
  if (lane.finished.data() == nullptr) return 1;  // the host is at the newest
  std::atomic_ref<uint32_t> finished(*static_cast<uint32_t*>(lane.finished.data()));
  return lane.noted - finished.load(std::memory_order_acquire);
}

std::string FlightRecorder::Report() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string report = absl::StrCat("step ", step_);
  for (const auto& [name, lane] : lanes_) {
    const size_t kept = lane.names.size(), unfinished = Unfinished(lane);
    absl::StrAppend(&report, "\n", name, ": finished ");
    if (unfinished < kept)
      absl::StrAppend(&report, "`", lane.names[kept - 1 - unfinished], "`, waits for ");
    else
      absl::StrAppend(&report, "none of the last ", kept, ", waits for ");
    if (unfinished == 0)
      absl::StrAppend(&report, "nothing");
    else if (unfinished <= kept)
      absl::StrAppend(&report, "`", lane.names[kept - unfinished], "`");
    else
      absl::StrAppend(&report, "what came before them");
    if (unfinished > 1) absl::StrAppend(&report, " (", unfinished - 1, " more behind it)");
  }
  return report;
}

}  // namespace annulus
