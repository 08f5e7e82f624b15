#include <algorithm>
#include <map>

#include "absl/strings/str_format.h"
#include "annulus/comm/exchange_timeline.h"

namespace annulus {
namespace {

// Stretches of time, in order and apart from each other.
using Stretches = std::vector<StepTiming>;

Stretches Union(Stretches timings) {
  std::sort(timings.begin(), timings.end(),
            [](const StepTiming& a, const StepTiming& b) { return a.start < b.start; });
  Stretches apart;
  for (const StepTiming& timing : timings) {
    if (apart.empty() || apart.back().end < timing.start) {
      apart.push_back(timing);
    } else {
      apart.back().end = std::max(apart.back().end, timing.end);
    }
  }
  return apart;
}

double Length(const Stretches& stretches) {
  double length = 0;
  for (const StepTiming& each : stretches) length += each.end - each.start;
  return length;
}

// Of what is in both.
double CommonLength(const Stretches& a, const Stretches& b) {
  double length = 0;
  for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    length += std::max(0.0, std::min(a[i].end, b[j].end) - std::max(a[i].start, b[j].start));
    if (a[i].end < b[j].end) {
      ++i;
    } else {
      ++j;
    }
  }
  return length;
}

}  // namespace

TimelineOverlap OverlapOf(const ExchangePlan& plan, const Simulation& simulation) {
  TimelineOverlap overlap;
  std::map<std::pair<int, int>, Stretches> messages;  // by sender and receiver
  for (size_t r = 0; r < plan.ranks.size(); ++r) {
    Stretches computing, transfers;
    for (size_t s = 0; s < plan.ranks[r].steps.size(); ++s) {
      const Step& step = plan.ranks[r].steps[s];
      const StepTiming& timing = simulation.steps[r][s];
      (IsCompute(step.kind) ? computing : transfers).push_back(timing);
      if (step.kind == StepKind::kReceive) messages[{step.peer, static_cast<int>(r)}].push_back(timing);
    }
    const Stretches moving = Union(std::move(transfers));
    overlap.transfers += Length(moving);
    overlap.under_compute += CommonLength(moving, Union(std::move(computing)));
  }
  for (const auto& [ends, timings] : messages) {
    const auto back = messages.find({ends.second, ends.first});
    if (ends.first > ends.second || back == messages.end()) continue;
    const Stretches there = Union(timings), here = Union(back->second);
    overlap.both_ways += CommonLength(there, here);
    overlap.shorter_way += std::min(Length(there), Length(here));
  }
  return overlap;
}

std::string OverlapText(const TimelineOverlap& overlap) {
  const auto part = [](double part, double whole) {
    return absl::StrFormat("%.3f of %.3f ms (%.0f%%)", part * 1e3, whole * 1e3,
                           whole > 0 ? 100 * part / whole : 0);
  };
  return absl::StrCat(overlap.shorter_way > 0 ? absl::StrCat("both directions between ranks at once for ",
                                                             part(overlap.both_ways, overlap.shorter_way))
                                              : "between no two ranks both directions",
                      "; ", part(overlap.under_compute, overlap.transfers), " of transfers under computing");
}

}  // namespace annulus
