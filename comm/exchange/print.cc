#include <algorithm>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "plan_text.h"

namespace annulus {
namespace {

std::string Describe(const Step& step) {
  const std::string rows = absl::StrCat("block ", step.block, " rows ", RowsText(step.rows));
  switch (step.kind) {
    case StepKind::kAttend: {
      int64_t pairs = 0;
      for (const BlockPair& pair : step.pairs) pairs += pair.pairs;
      std::string text = absl::StrCat("attend ", rows, " in slot ", step.slot, ", ", pairs, " pairs");
      if (step.grad_slot >= 0) {
        const bool overwrite = step.grad_write == GradWrite::kOverwrite;
        absl::StrAppend(&text, overwrite ? ", gradient overwrites slot " : ", gradient adds to slot ",
                        step.grad_slot);
      }
      return text;
    }
    case StepKind::kReduce:
      return absl::StrCat("reduce ", rows, " of slot ", step.slot, " into slot ", step.grad_slot);
    case StepKind::kSend:
      return absl::StrCat("send ", rows, " of slot ", step.slot, " to rank ", step.peer, ", message ",
                          step.message);
    case StepKind::kReceive:
      return absl::StrCat("receive ", rows, " into slot ", step.slot, " from rank ", step.peer, ", message ",
                          step.message);
    case StepKind::kCollective:
      return "collective";
  }
  return "unknown";
}

char BlockLetter(int block) {
  constexpr char kLetters[] = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
  constexpr int kCount = static_cast<int>(sizeof(kLetters)) - 1;
  return 0 <= block && block < kCount ? kLetters[block] : '#';
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

double EndOfComputing(const RankPlan& rank, const std::vector<StepTiming>& timings) {
  double end = 0;
  for (size_t s = 0; s < timings.size(); ++s) {
    if (IsCompute(rank.steps[s].kind)) end = std::max(end, timings[s].end);
  }
  return end;
}

}  // namespace

bool IsCompute(StepKind kind) { return kind == StepKind::kAttend || kind == StepKind::kReduce; }
bool IsTransfer(StepKind kind) { return kind == StepKind::kSend || kind == StepKind::kReceive; }

std::string RowsText(const RowRange& rows) { return absl::StrCat("[", rows.begin, ", ", rows.end, ")"); }

std::string StepText(const ExchangePlan& plan, int cp_rank, size_t step) {
  return absl::StrCat("rank ", cp_rank, " step ", step, " (",
                      Describe(plan.ranks[static_cast<size_t>(cp_rank)].steps[step]), ")");
}

std::string ToString(const ExchangePlan& plan) {
  std::string text =
      absl::StrCat(plan.name, ", ", plan.pass == Pass::kForward ? "forward" : "backward", ", ",
                   plan.ranks.size(), " ranks, blocks of ", plan.problem.block_rows, " rows\n");
  for (size_t r = 0; r < plan.ranks.size(); ++r) {
    const std::vector<Step>& steps = plan.ranks[r].steps;
    for (size_t s = 0; s < steps.size(); ++s) {
      absl::StrAppendFormat(&text, "rank %d  %3d  %s", r, s, Describe(steps[s]));
      if (!steps[s].after.empty()) absl::StrAppend(&text, ", after ", absl::StrJoin(steps[s].after, " "));
      absl::StrAppend(&text, "\n");
    }
  }
  return text;
}

std::string Timeline(const ExchangePlan& plan, const Simulation& simulation, int columns) {
  ANNULUS_CHECK(columns >= 1) << "columns " << columns;
  std::string text = absl::StrFormat(
      "%s, %s: %.3f ms; a letter is a block, '.' waits to compute, '+' adds up gradients\n", plan.name,
      plan.pass == Pass::kForward ? "forward" : "backward", simulation.makespan * 1e3);
  for (size_t r = 0; r < plan.ranks.size(); ++r) {
    Lane compute(simulation.makespan, columns), kv(compute), grad(compute);
    const RankPlan& rank = plan.ranks[r];
    // Waits wherever it does not compute, until it has nothing left to compute.
    const double computed = EndOfComputing(rank, simulation.steps[r]);
    if (computed > 0) compute.Draw({.start = 0, .end = computed}, '.');
    for (size_t s = 0; s < rank.steps.size(); ++s) {
      const Step& step = rank.steps[s];
      const StepTiming& timing = simulation.steps[r][s];
      const char letter = BlockLetter(step.block);
      if (step.kind == StepKind::kAttend) compute.Draw(timing, letter);
      if (step.kind == StepKind::kReduce && timing.end > timing.start) compute.Draw(timing, '+');
      if (step.kind != StepKind::kReceive) continue;
      const bool is_kv = rank.slots[static_cast<size_t>(step.slot)].payload == Payload::kKv;
      (is_kv ? kv : grad).Draw(timing, letter);
    }
    absl::StrAppendFormat(&text, "rank %-3d compute  |%s|  exposed %.3f ms\n", r, compute.text(),
                          simulation.exposed[r] * 1e3);
    absl::StrAppendFormat(&text, "         kv in    |%s|\n", kv.text());
    if (plan.pass == Pass::kBackward) absl::StrAppendFormat(&text, "         grad in  |%s|\n", grad.text());
  }
  return text;
}

}  // namespace annulus
