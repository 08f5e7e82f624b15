#include <algorithm>

#include "absl/strings/str_format.h"
#include "annulus/base/check.h"
#include "annulus/comm/exchange_simulate.h"

namespace annulus {
namespace {

constexpr char kSeveral = '*';

char BlockLetter(int block) {
  constexpr char kLetters[] = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
  constexpr int kCount = static_cast<int>(sizeof(kLetters)) - 1;
  return 0 <= block && block < kCount ? kLetters[block] : '#';
}

char LetterOf(const std::vector<BlockRows>& rows) {
  const bool several = std::any_of(rows.begin(), rows.end(),
                                   [&](const BlockRows& each) { return each.block != rows[0].block; });
  return rows.empty() || several ? kSeveral : BlockLetter(rows[0].block);
}

// Draws intervals of time as letters; blank elsewhere.
class Lane {
 public:
  Lane(double makespan, int columns)
      : scale_(makespan > 0 ? columns / makespan : 0), text_(static_cast<size_t>(columns), ' ') {}

  // At least one column, so that short steps can be seen.
  void Draw(const StepTiming& timing, char letter) {
    const auto last = static_cast<int64_t>(text_.size()) - 1;
    const int64_t begin = std::min(static_cast<int64_t>(timing.start * scale_), last);
    const int64_t end = std::clamp(static_cast<int64_t>(timing.end * scale_), begin + 1, last + 1);
    std::fill(text_.begin() + begin, text_.begin() + end, letter);
  }
  const std::string& text() const { return text_; }

 private:
  double scale_;
  std::string text_;
};

// What a plan's lanes have to show.
struct Content {
  bool queries_vary = false, keys_vary = false;  // a rank computes on blocks of others
  bool queries_come = false, kv_comes = false, results_come = false;
};

Content ContentOf(const ExchangePlan& plan) {
  Content content;
  for (size_t r = 0; r < plan.ranks.size(); ++r) {
    const auto foreign = [&](const BlockRows& rows) { return rows.block != static_cast<int>(r); };
    for (const Step& step : plan.ranks[r].steps) {
      if (step.kind == StepKind::kAttend) {
        const Attend& attend = step.attend;
        content.queries_vary |= std::any_of(attend.q_rows.begin(), attend.q_rows.end(), foreign);
        content.keys_vary |= std::any_of(attend.kv_rows.begin(), attend.kv_rows.end(), foreign);
      }
      if (step.kind != StepKind::kReceive) continue;
      const Payload payload = plan.ranks[r].slots[static_cast<size_t>(step.slot)].payload;
      content.queries_come |= payload == Payload::kQuery;
      content.kv_comes |= payload == Payload::kKv;
      content.results_come |= IsResult(payload);
    }
  }
  return content;
}

// Waits wherever it does not compute, until it has nothing left to compute.
Lane ComputeLane(const Lane& blank, const RankPlan& rank, const std::vector<StepTiming>& timings,
                 std::vector<BlockRows> Attend::* rows) {
  Lane lane = blank;
  double computed = 0;
  for (size_t s = 0; s < timings.size(); ++s) {
    if (IsCompute(rank.steps[s].kind)) computed = std::max(computed, timings[s].end);
  }
  if (computed > 0) lane.Draw({.start = 0, .end = computed}, '.');
  for (size_t s = 0; s < timings.size(); ++s) {
    const Step& step = rank.steps[s];
    if (!IsCompute(step.kind) || timings[s].end <= timings[s].start) continue;
    const char letter = step.kind == StepKind::kAttend ? LetterOf(step.attend.*rows)
                        : step.kind == StepKind::kCopy ? '~'
                                                       : '+';
    lane.Draw(timings[s], letter);
  }
  return lane;
}

template <typename Predicate>
Lane ArrivalLane(const Lane& blank, const RankPlan& rank, const std::vector<StepTiming>& timings,
                 const Predicate& shown) {
  Lane lane = blank;
  for (size_t s = 0; s < timings.size(); ++s) {
    const Step& step = rank.steps[s];
    if (step.kind == StepKind::kReceive && shown(rank.slots[static_cast<size_t>(step.slot)].payload))
      lane.Draw(timings[s], BlockLetter(step.rows.block));
  }
  return lane;
}

}  // namespace

const char* Name(TimeSource source) { return source == TimeSource::kPredicted ? "predicted" : "measured"; }

std::string Timeline(const ExchangePlan& plan, const Simulation& simulation, int columns) {
  ANNULUS_CHECK(columns >= 1) << "columns " << columns;
  std::string text = absl::StrFormat(
      "%s, %s: %s %.3f ms; a letter is a block, '*' several, '.' waits to compute, '+' adds results up, '~' "
      "copies\n",
      plan.name, plan.pass == Pass::kForward ? "forward" : "backward", Name(simulation.source),
      simulation.makespan * 1e3);
  const Content content = ContentOf(plan);
  for (size_t r = 0; r < plan.ranks.size(); ++r) {
    const Lane blank(simulation.makespan, columns);
    const RankPlan& rank = plan.ranks[r];
    const std::vector<StepTiming>& timings = simulation.steps[r];
    std::string name = absl::StrFormat("rank %-3d", r);
    std::string exposed = absl::StrFormat("  exposed %.3f ms", simulation.exposed[r] * 1e3);
    const auto add = [&](const char* what, const Lane& lane) {
      absl::StrAppendFormat(&text, "%-8s %-11s|%s|%s\n", name, what, lane.text(), exposed);
      name = "", exposed = "";
    };
    if (content.queries_vary) add("on queries", ComputeLane(blank, rank, timings, &Attend::q_rows));
    if (content.keys_vary || !content.queries_vary)
      add("on keys", ComputeLane(blank, rank, timings, &Attend::kv_rows));
    const auto arrivals = [&](const char* what, const auto& shown) {
      add(what, ArrivalLane(blank, rank, timings, shown));
    };
    if (content.queries_come) arrivals("queries in", [](Payload p) { return p == Payload::kQuery; });
    if (content.kv_comes) arrivals("kv in", [](Payload p) { return p == Payload::kKv; });
    if (content.results_come) arrivals("results in", IsResult);
  }
  return text;
}

}  // namespace annulus
