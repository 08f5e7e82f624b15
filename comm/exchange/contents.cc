#include "contents.h"

#include <algorithm>

#include "plan_text.h"
#include "row_set.h"

namespace annulus {

PlanContents::PlanContents(const ExchangePlan& plan)
    : plan_(plan), words_((plan.problem.chunks.size() + 63) / 64), computed_(plan.problem.keys.size()) {
  for (size_t r = 0; r < plan.ranks.size(); ++r) {
    slots_.emplace_back();
    for (const SlotSpec& spec : plan.ranks[r].slots) {
      Content content{.block = spec.home ? static_cast<int>(r) : -1, .added = {}};
      if (spec.payload == Payload::kKvGrad) content.added.resize(words_);
      slots_.back().push_back({{.rows = {0, plan.problem.block_rows}, .content = content}});
    }
  }
}

std::vector<PlanContents::Segment*> PlanContents::Cut(Slot* slot, const RowRange& rows) {
  for (const int64_t row : {rows.begin, rows.end}) {
    const auto inside = std::find_if(slot->begin(), slot->end(), [&](const Segment& segment) {
      return segment.rows.begin < row && row < segment.rows.end;
    });
    if (inside == slot->end()) continue;
    Segment tail = *inside;
    tail.rows.begin = inside->rows.end = row;
    slot->insert(inside + 1, std::move(tail));
  }
  std::vector<Segment*> segments;
  for (Segment& segment : *slot) {
    if (Overlap(segment.rows, rows)) segments.push_back(&segment);
  }
  return segments;
}

absl::Status PlanContents::Wrong(int cp_rank, size_t step, const std::string& what) const {
  return absl::FailedPreconditionError(
      absl::StrCat(plan_.name, ": ", StepText(plan_, cp_rank, step), ": ", what));
}

absl::Status PlanContents::Compute(int cp_rank, size_t step) {
  const StepKind kind = plan_.ranks[static_cast<size_t>(cp_rank)].steps[step].kind;
  return kind == StepKind::kAttend ? Attend(cp_rank, step) : Reduce(cp_rank, step);
}

absl::Status PlanContents::Attend(int cp_rank, size_t s) {
  const Step& step = plan_.ranks[static_cast<size_t>(cp_rank)].steps[s];
  if (step.grad_slot >= 0 && step.grad_write == GradWrite::kOverwrite) {
    for (Segment* segment : Cut(&SlotOf(cp_rank, step.grad_slot), step.rows)) {
      segment->content = {.block = step.block, .added = std::vector<uint64_t>(words_)};
    }
  }
  for (const BlockPair& pair : step.pairs) {
    for (const Segment* segment : Cut(&SlotOf(cp_rank, step.slot), pair.keys)) {
      if (segment->content.block == step.block) continue;
      return Wrong(cp_rank, s,
                   absl::StrCat("rows ", RowsText(segment->rows), " of slot ", step.slot, " hold ",
                                segment->content.block < 0 ? "nothing" : "another block"));
    }
    const size_t index =
        static_cast<size_t>(pair.q_chunk) * plan_.problem.chunks.size() + static_cast<size_t>(pair.kv_chunk);
    if (computed_[index]) {
      return Wrong(cp_rank, s,
                   absl::StrCat("chunk ", pair.q_chunk, " against chunk ", pair.kv_chunk,
                                " has been computed before"));
    }
    computed_[index] = true;
    if (step.grad_slot >= 0) ANNULUS_RETURN_IF_ERROR(AddGradient(cp_rank, s, pair));
  }
  return absl::OkStatus();
}

absl::Status PlanContents::AddGradient(int cp_rank, size_t s, const BlockPair& pair) {
  const Step& step = plan_.ranks[static_cast<size_t>(cp_rank)].steps[s];
  const size_t chunk = static_cast<size_t>(pair.q_chunk);
  for (Segment* segment : Cut(&SlotOf(cp_rank, step.grad_slot), pair.keys)) {
    if (segment->content.block != step.block) {
      return Wrong(cp_rank, s,
                   absl::StrCat("adds to rows ", RowsText(segment->rows), " of slot ", step.grad_slot,
                                ", which hold no gradient of the block"));
    }
    segment->content.added[chunk / 64] |= uint64_t{1} << (chunk % 64);
  }
  return absl::OkStatus();
}

absl::Status PlanContents::Reduce(int cp_rank, size_t s) {
  const Step& step = plan_.ranks[static_cast<size_t>(cp_rank)].steps[s];
  for (Segment* from : Cut(&SlotOf(cp_rank, step.slot), step.rows)) {
    for (Segment* to : Cut(&SlotOf(cp_rank, step.grad_slot), from->rows)) {
      if (from->content.block != step.block || to->content.block != step.block) {
        return Wrong(cp_rank, s,
                     absl::StrCat("rows ", RowsText(to->rows), " do not hold gradients of the block"));
      }
      for (size_t word = 0; word < words_; ++word) {
        if ((from->content.added[word] & to->content.added[word]) != 0) {
          return Wrong(cp_rank, s, absl::StrCat("adds a gradient to rows ", RowsText(to->rows), " twice"));
        }
        to->content.added[word] |= from->content.added[word];
      }
    }
  }
  return absl::OkStatus();
}

absl::Status PlanContents::Move(int from_rank, size_t send, int to_rank, size_t receive) {
  const Step& sender = plan_.ranks[static_cast<size_t>(from_rank)].steps[send];
  const Step& receiver = plan_.ranks[static_cast<size_t>(to_rank)].steps[receive];
  Slot& target = SlotOf(to_rank, receiver.slot);
  for (const Segment* from : Cut(&SlotOf(from_rank, sender.slot), sender.rows)) {
    if (from->content.block != sender.block) {
      return Wrong(from_rank, send,
                   absl::StrCat("rows ", RowsText(from->rows), " of slot ", sender.slot, " hold ",
                                from->content.block < 0 ? "nothing" : "another block"));
    }
    for (Segment* to : Cut(&target, from->rows)) to->content = from->content;
  }
  return absl::OkStatus();
}

absl::Status PlanContents::CheckResult() const {
  const ExchangeProblem& problem = plan_.problem;
  const size_t chunks = problem.chunks.size();
  const auto wrong = [&](const std::string& what) {
    return absl::FailedPreconditionError(absl::StrCat(plan_.name, ": ", what));
  };
  for (size_t i = 0; i < chunks; ++i) {
    for (size_t j = 0; j < chunks; ++j) {
      if (computed_[i * chunks + j] || problem.keys_of(i, j).empty()) continue;
      return wrong(
          absl::StrCat("rank ", problem.chunks[i].owner, " never computes chunk ", i, " against chunk ", j));
    }
  }
  if (plan_.pass == Pass::kForward) return absl::OkStatus();
  for (size_t j = 0; j < chunks; ++j) {
    const size_t owner = static_cast<size_t>(problem.chunks[j].owner);
    const std::vector<SlotSpec>& specs = plan_.ranks[owner].slots;
    const auto home = std::find_if(specs.begin(), specs.end(), [](const SlotSpec& spec) {
      return spec.home && spec.payload == Payload::kKvGrad;
    });
    if (home == specs.end()) return wrong(absl::StrCat("rank ", owner, " has no home slot for gradients"));
    Slot slot = slots_[owner][static_cast<size_t>(home - specs.begin())];
    for (size_t i = 0; i < chunks; ++i) {
      // Split where chunk i's keys begin and end; then each segment of chunk j has all of them or none.
      Cut(&slot, problem.keys_of(i, j));
      for (const Segment* segment : Cut(&slot, problem.chunks[j].rows)) {
        const bool expected = Overlap(segment->rows, problem.keys_of(i, j));
        const bool added = (segment->content.added[i / 64] >> (i % 64) & 1) != 0;
        if (segment->content.block == static_cast<int>(owner) && added == expected) continue;
        return wrong(absl::StrCat("rank ", owner, ": the gradient of rows ", RowsText(segment->rows),
                                  " ends ", added ? "with" : "without", " the part of chunk ", i));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace annulus
