#include <algorithm>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "plan_text.h"

namespace annulus {
namespace {

// "kv of " if the slot exists.
std::string PayloadIn(const RankPlan& rank, int slot) {
  if (slot < 0 || slot >= static_cast<int>(rank.slots.size())) return "";
  return absl::StrCat(Name(rank.slots[static_cast<size_t>(slot)].payload), " of ");
}

// Many ranges (of a super-block) as their number.
std::string ListText(const std::vector<BlockRows>& list) {
  constexpr size_t kMost = 4;
  if (list.empty()) return "no rows";
  const std::string first = absl::StrJoin(
      list.begin(), list.begin() + static_cast<std::ptrdiff_t>(std::min(kMost, list.size())), " + ",
      [](std::string* out, const BlockRows& rows) { absl::StrAppend(out, RowsText(rows)); });
  return list.size() <= kMost ? first : absl::StrCat(first, " + ", list.size() - kMost, " more");
}

std::string Describe(const Attend& attend, Pass pass) {
  int64_t pairs = 0;
  for (const BlockPair& pair : attend.pairs) pairs += pair.pairs;
  std::string text =
      absl::StrCat("attend queries of ", ListText(attend.q_rows), " in slot ", attend.q_slot, ", keys of ",
                   ListText(attend.kv_rows), " in slot ", attend.kv_slot, ", ", pairs, " pairs");
  const auto append = [&](const char* what, ResultWrite write, int slot) {
    const bool overwrites = write == ResultWrite::kOverwrite;
    absl::StrAppend(&text, ", ", what, overwrites ? " overwrites slot " : " adds to slot ", slot);
  };
  const bool backward = pass == Pass::kBackward;
  append(Name(backward ? Payload::kQueryGrad : Payload::kOutput), attend.q_write, attend.q_result);
  if (backward) append(Name(Payload::kKvGrad), attend.kv_write, attend.kv_result);
  if (attend.arrival == KeyArrival::kDuring) absl::StrAppend(&text, ", takes keys as they come");
  return text;
}

std::string Describe(const Step& step, const RankPlan& rank, Pass pass) {
  const std::string rows = PayloadIn(rank, step.slot) + RowsText(step.rows);
  switch (step.kind) {
    case StepKind::kAttend:
      return Describe(step.attend, pass);
    case StepKind::kCopy:
      return absl::StrCat("copy ", rows, " of slot ", step.slot, " into slot ", step.into);
    case StepKind::kReduce:
      return absl::StrCat("add ", rows, " of slot ", step.slot, " to slot ", step.into);
    case StepKind::kSend:
      return absl::StrCat("send ", rows, " of slot ", step.slot, " to rank ", step.peer, ", message ",
                          step.message);
    case StepKind::kReceive:
      return absl::StrCat("receive ", rows, " into slot ", step.slot, " from rank ", step.peer, ", message ",
                          step.message);
  }
  return "unknown";
}

// "3 kv of group 1, super-block"
std::string Describe(const SlotSpec& slot, const ExchangePlan& plan) {
  std::string text = absl::StrCat(slot.home ? "home " : "", Name(slot.payload));
  if (plan.groups.size() > 1 && slot.group != kAllHeads) absl::StrAppend(&text, " of group ", slot.group);
  if (slot.span == Span::kSuper) absl::StrAppend(&text, ", super-block");
  if (slot.width == Width::kCompute) absl::StrAppend(&text, ", rounded");
  return text;
}

std::string Describe(const HeadGroup& group) {
  return absl::StrCat("query heads [", group.q_begin, ", ", group.q_end, ") with kv heads ",
                      absl::StrJoin(group.kv_heads, " "));
}

}  // namespace

const char* Name(Payload payload) {
  constexpr const char* kNames[kPayloads] = {"query", "kv", "output", "query gradient", "kv gradient"};
  const auto index = static_cast<size_t>(payload);
  return index < kPayloads ? kNames[index] : "unknown payload";
}

std::string RowsText(const RowRange& rows) { return absl::StrCat("[", rows.begin, ", ", rows.end, ")"); }

std::string RowsText(const BlockRows& rows) {
  return absl::StrCat("block ", rows.block, " rows ", RowsText(rows.rows));
}

std::string StepText(const ExchangePlan& plan, int cp_rank, size_t step) {
  const RankPlan& rank = plan.ranks[static_cast<size_t>(cp_rank)];
  return absl::StrCat("rank ", cp_rank, " step ", step, " (", Describe(rank.steps[step], rank, plan.pass),
                      ")");
}

std::string ToString(const ExchangePlan& plan) {
  std::string text =
      absl::StrCat(plan.name, ", ", plan.pass == Pass::kForward ? "forward" : "backward", ", ",
                   plan.ranks.size(), " ranks, blocks of ", plan.problem.block_rows, " rows\n");
  for (size_t g = 0; plan.groups.size() > 1 && g < plan.groups.size(); ++g)
    absl::StrAppend(&text, "group ", g, ": ", Describe(plan.groups[g]), "\n");
  for (size_t r = 0; r < plan.ranks.size(); ++r) {
    const RankPlan& rank = plan.ranks[r];
    for (size_t s = 0; s < rank.slots.size(); ++s)
      absl::StrAppendFormat(&text, "rank %d slot %2d  %s\n", r, s, Describe(rank.slots[s], plan));
    for (size_t s = 0; s < rank.steps.size(); ++s) {
      const Step& step = rank.steps[s];
      absl::StrAppendFormat(&text, "rank %d step %2d  %s", r, s, Describe(step, rank, plan.pass));
      if (!step.after.empty()) absl::StrAppend(&text, ", after ", absl::StrJoin(step.after, " "));
      absl::StrAppend(&text, "\n");
    }
  }
  return text;
}

}  // namespace annulus
