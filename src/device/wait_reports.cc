#include "annulus/device/wait_reports.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace annulus {
namespace {

// Global, because a CUDA call that fails knows nothing of the kernel that did; only ever printed. Never
// destroyed: owners may be later than statics.
struct Registry {
  std::mutex mutex;
  std::vector<const WaitReports*> all;
};
Registry& TheRegistry() {
  static Registry* const registry = new Registry;
  return *registry;
}

}  // namespace

WaitReports::WaitReports(Device device)
    : memory_(device, kPlaces * static_cast<int64_t>(sizeof(WaitReport))), parts_(kPlaces) {
  std::fill_n(places(), kPlaces, WaitReport());
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  registry.all.push_back(this);
}

WaitReports::~WaitReports() {
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  std::erase(registry.all, this);
}

WaitReport* WaitReports::Add(std::vector<std::string> parts) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t place = next_++ % kPlaces;
  parts_[place] = std::move(parts);
  return &places()[place];
}

std::string WaitReports::Text() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string text;
  for (size_t place = 0; place < kPlaces; ++place) {
    const volatile WaitReport& written = places()[place];
    const int32_t part = written.part;
    if (part == WaitReport::kNone) continue;
    const uint32_t value = written.value, awaited = written.awaited, waited_ms = written.waited_ms;
    const bool named = part >= 0 && static_cast<size_t>(part) < parts_[place].size();
    const std::string what = named ? parts_[place][static_cast<size_t>(part)] : "another thread block";
    absl::StrAppend(&text, text.empty() ? "" : "; ", "waited ", waited_ms, " ms for ", what);
    if (named) absl::StrAppend(&text, ": its flag is ", value, ", awaited ", awaited);
  }
  return text;
}

std::string WhyKernelsGaveUp() {
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  std::string text;
  for (const WaitReports* reports : registry.all) {
    const std::string of_one = reports->Text();
    if (!of_one.empty()) absl::StrAppend(&text, text.empty() ? "" : "; ", of_one);
  }
  return text;
}

}  // namespace annulus
