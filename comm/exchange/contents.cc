#include "contents.h"

#include <algorithm>

#include "plan_text.h"
#include "row_set.h"

namespace annulus {

bool ChunkSet::Meets(const ChunkSet& other) const {
  for (size_t i = 0; i < words_.size(); ++i) {
    if ((words_[i] & other.words_[i]) != 0) return true;
  }
  return false;
}

void ChunkSet::Add(const ChunkSet& other) {
  for (size_t i = 0; i < words_.size(); ++i) words_[i] |= other.words_[i];
}

size_t SlotContents::Find(int64_t row) const {
  const auto segment = std::upper_bound(segments_.begin(), segments_.end(), row,
                                        [](int64_t r, const Segment& s) { return r < s.rows.end; });
  return static_cast<size_t>(segment - segments_.begin());
}

std::vector<SlotContents::Segment> SlotContents::Read(const RowRange& rows) const {
  std::vector<Segment> result;
  Visit(rows, [&](const RowRange& part, const Segment& segment) {
    result.push_back({.rows = part, .first = segment.FirstAt(part.begin), .added = segment.added});
    return true;
  });
  return result;
}

size_t SlotContents::SplitAt(int64_t row) {
  const size_t i = Find(row);
  if (i == segments_.size() || segments_[i].rows.begin == row) return i;
  Segment tail = segments_[i];
  segments_[i].rows.end = tail.rows.begin = row;
  if (tail.first != kNothing) tail.first += segments_[i].rows.size();
  segments_.insert(segments_.begin() + static_cast<std::ptrdiff_t>(i) + 1, std::move(tail));
  return i + 1;
}

SlotContents::Slice SlotContents::Cut(const RowRange& rows) {
  const size_t begin = SplitAt(rows.begin), end = SplitAt(rows.end);
  return {segments_.data() + begin, segments_.data() + end};
}

void SlotContents::Write(const RowRange& rows, std::vector<Segment> segments) {
  const auto begin = static_cast<std::ptrdiff_t>(SplitAt(rows.begin));
  const auto end = static_cast<std::ptrdiff_t>(SplitAt(rows.end));
  const auto size = static_cast<std::ptrdiff_t>(segments.size());
  const std::ptrdiff_t common = std::min(size, end - begin);
  std::move(segments.begin(), segments.begin() + common, segments_.begin() + begin);
  segments_.erase(segments_.begin() + begin + common, segments_.begin() + end);
  segments_.insert(segments_.begin() + begin + common, std::make_move_iterator(segments.begin() + common),
                   std::make_move_iterator(segments.end()));
}

PlanContents::PlanContents(const ExchangePlan& plan)
    : plan_(plan),
      chunks_(plan.problem.chunks.size()),
      computed_(plan.groups.size() * chunks_, ChunkSet(chunks_)) {
  for (size_t r = 0; r < plan.ranks.size(); ++r) {
    slots_.emplace_back();
    for (const SlotSpec& spec : plan.ranks[r].slots) {
      const bool each_group = IsResult(spec.payload) && spec.group == kAllHeads;
      const Segment all{.rows = {0, SlotRows(plan, spec)},
                        .first = spec.home ? FirstRow({static_cast<int>(r), {0, 0}}) : SlotContents::kNothing,
                        .added = spec.home && IsResult(spec.payload) ? ChunkSet(chunks_) : ChunkSet()};
      slots_.back().emplace_back(each_group ? plan.groups.size() : 1, SlotContents(all));
    }
  }
}

const Step& PlanContents::StepAt(const Place& at) const {
  return plan_.ranks[static_cast<size_t>(at.cp_rank)].steps[at.step];
}

const SlotSpec& PlanContents::SpecOf(const Place& at, int slot) const {
  return plan_.ranks[static_cast<size_t>(at.cp_rank)].slots[static_cast<size_t>(slot)];
}

SlotContents& PlanContents::ContentsOf(const Place& at, int slot, int group) {
  std::vector<SlotContents>& groups = slots_[static_cast<size_t>(at.cp_rank)][static_cast<size_t>(slot)];
  return groups.size() == 1 ? groups[0] : groups[static_cast<size_t>(group)];
}

RowRange PlanContents::InSlot(const Place& at, int slot, const BlockRows& rows) const {
  const int64_t begin = RowInSlot(plan_, SpecOf(at, slot), rows);
  return {begin, begin + rows.rows.size()};
}

absl::Status PlanContents::Wrong(const Place& at, const std::string& what) const {
  return absl::FailedPreconditionError(
      absl::StrCat(plan_.name, ": ", StepText(plan_, at.cp_rank, at.step), ": ", what));
}

absl::Status PlanContents::Compute(int cp_rank, size_t step) {
  const Place at{cp_rank, step};
  switch (StepAt(at).kind) {
    case StepKind::kAttend:
      return Attend(at);
    case StepKind::kCopy:
      return CopyRows(at, StepAt(at).slot, at, StepAt(at).into);
    default:
      return Reduce(at);
  }
}

absl::Status PlanContents::Move(int from_rank, size_t send, int to_rank, size_t receive) {
  const Place from{from_rank, send}, to{to_rank, receive};
  return CopyRows(from, StepAt(from).slot, to, StepAt(to).slot);
}

absl::Status PlanContents::CheckHeld(const Place& at, int slot, int group, const BlockRows& rows) {
  const RowRange place = InSlot(at, slot, rows);
  const int64_t n = plan_.problem.block_rows, shift = rows.rows.begin - place.begin;
  absl::Status status;
  ContentsOf(at, slot, group).Visit(place, [&](const RowRange& part, const Segment& segment) {
    const BlockRows expected{rows.block, {part.begin + shift, part.end + shift}};
    const int64_t held = segment.FirstAt(part.begin);
    if (held == FirstRow(expected)) return true;
    status = Wrong(at, absl::StrCat("expected ", RowsText(expected), " in slot ", slot, ": there is ",
                                    held == SlotContents::kNothing
                                        ? "nothing"
                                        : absl::StrCat("row ", held % n, " of block ", held / n)));
    return false;
  });
  return status;
}

absl::Status PlanContents::CopyRows(const Place& from, int from_slot, const Place& to, int to_slot) {
  const BlockRows& rows = StepAt(from).rows;
  const int group = std::max(SpecOf(from, from_slot).group, SpecOf(to, to_slot).group);
  ANNULUS_RETURN_IF_ERROR(CheckHeld(from, from_slot, group, rows));
  const RowRange source = InSlot(from, from_slot, rows), target = InSlot(to, to_slot, rows);
  std::vector<Segment> segments = ContentsOf(from, from_slot, group).Read(source);
  for (Segment& segment : segments) {
    segment.rows.begin += target.begin - source.begin;
    segment.rows.end += target.begin - source.begin;
  }
  ContentsOf(to, to_slot, group).Write(target, std::move(segments));
  return absl::OkStatus();
}

absl::Status PlanContents::Reduce(const Place& at) {
  const Step& step = StepAt(at);
  const int group = SpecOf(at, step.slot).group;
  ANNULUS_RETURN_IF_ERROR(CheckHeld(at, step.slot, group, step.rows));
  ANNULUS_RETURN_IF_ERROR(CheckHeld(at, step.into, group, step.rows));
  const RowRange source = InSlot(at, step.slot, step.rows), target = InSlot(at, step.into, step.rows);
  SlotContents& into = ContentsOf(at, step.into, group);
  for (const Segment& from : ContentsOf(at, step.slot, group).Read(source)) {
    const int64_t shift = target.begin - source.begin;
    for (Segment& to : into.Cut({from.rows.begin + shift, from.rows.end + shift})) {
      if (to.added.Meets(from.added))
        return Wrong(at, absl::StrCat("adds to rows ", RowsText(to.rows), " of slot ", step.into,
                                      " what they have already"));
      to.added.Add(from.added);
    }
  }
  return absl::OkStatus();
}

void PlanContents::Empty(const Place& at, int slot, const std::vector<BlockRows>& list) {
  for (const BlockRows& rows : list) {
    const RowRange place = InSlot(at, slot, rows);
    ContentsOf(at, slot, SpecOf(at, slot).group)
        .Write(place, {{.rows = place, .first = FirstRow(rows), .added = ChunkSet(chunks_)}});
  }
}

absl::Status PlanContents::Add(const Place& at, int slot, const BlockRows& rows, size_t chunk) {
  const int group = SpecOf(at, slot).group;
  ANNULUS_RETURN_IF_ERROR(CheckHeld(at, slot, group, rows));
  for (Segment& segment : ContentsOf(at, slot, group).Cut(InSlot(at, slot, rows))) segment.added.Add(chunk);
  return absl::OkStatus();
}

absl::Status PlanContents::AttendPair(const Place& at, const BlockPair& pair) {
  const annulus::Attend& attend = StepAt(at).attend;
  const size_t i = static_cast<size_t>(pair.q_chunk), j = static_cast<size_t>(pair.kv_chunk);
  const BlockRows queries{plan_.problem.chunks[i].owner, plan_.problem.chunks[i].rows};
  const BlockRows keys{plan_.problem.chunks[j].owner, pair.keys};
  const int group = SpecOf(at, attend.q_slot).group;
  ChunkSet& computed = computed_[static_cast<size_t>(group) * chunks_ + i];
  if (computed.Has(j)) {
    return Wrong(at, absl::StrCat("chunk ", i, " against chunk ", j, " has been computed before"));
  }
  computed.Add(j);
  ANNULUS_RETURN_IF_ERROR(CheckHeld(at, attend.q_slot, group, queries));
  ANNULUS_RETURN_IF_ERROR(CheckHeld(at, attend.kv_slot, group, keys));
  // As every pair is computed once, no row can have the chunk already.
  ANNULUS_RETURN_IF_ERROR(Add(at, attend.q_result, queries, j));
  return plan_.pass == Pass::kForward ? absl::OkStatus() : Add(at, attend.kv_result, keys, i);
}

absl::Status PlanContents::Attend(const Place& at) {
  const annulus::Attend& attend = StepAt(at).attend;
  if (attend.q_write == ResultWrite::kOverwrite) Empty(at, attend.q_result, attend.q_rows);
  if (plan_.pass == Pass::kBackward && attend.kv_write == ResultWrite::kOverwrite)
    Empty(at, attend.kv_result, attend.kv_rows);
  for (const BlockPair& pair : attend.pairs) ANNULUS_RETURN_IF_ERROR(AttendPair(at, pair));
  return absl::OkStatus();
}

absl::Status PlanContents::CheckComputed(int group) const {
  for (size_t i = 0; i < chunks_; ++i) {
    const ChunkSet& computed = computed_[static_cast<size_t>(group) * chunks_ + i];
    for (size_t j = 0; j < chunks_; ++j) {
      if (computed.Has(j) || plan_.problem.keys_of(i, j).empty()) continue;
      return absl::FailedPreconditionError(absl::StrCat(plan_.name, ": no rank computes chunk ", i,
                                                        " against chunk ", j, " for head group ", group));
    }
  }
  return absl::OkStatus();
}

std::vector<PlanContents::Expected> PlanContents::ExpectedOfQueries(size_t chunk) const {
  Expected all{.rows = plan_.problem.chunks[chunk].rows, .added = ChunkSet(chunks_)};
  for (size_t j = 0; j < chunks_; ++j) {
    if (!plan_.problem.keys_of(chunk, j).empty()) all.added.Add(j);
  }
  return {all};
}

std::vector<PlanContents::Expected> PlanContents::ExpectedOfKeys(size_t chunk) const {
  const RowRange& all = plan_.problem.chunks[chunk].rows;
  std::vector<int64_t> ends = {all.begin, all.end};
  for (size_t i = 0; i < chunks_; ++i) {
    const RowRange& seen = plan_.problem.keys_of(i, chunk);
    if (!seen.empty()) ends.insert(ends.end(), {seen.begin, seen.end});
  }
  std::sort(ends.begin(), ends.end());
  ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
  std::vector<Expected> expected;
  for (size_t e = 0; e + 1 < ends.size(); ++e) {
    expected.push_back({.rows = {ends[e], ends[e + 1]}, .added = ChunkSet(chunks_)});
    for (size_t i = 0; i < chunks_; ++i) {
      if (Contains(plan_.problem.keys_of(i, chunk), expected.back().rows)) expected.back().added.Add(i);
    }
  }
  return expected;
}

absl::Status PlanContents::CheckHome(Payload payload, int owner,
                                     const std::vector<Expected>& expected) const {
  const std::vector<SlotSpec>& specs = plan_.ranks[static_cast<size_t>(owner)].slots;
  size_t home = 0;
  while (!(specs[home].home && specs[home].payload == payload)) ++home;
  const std::vector<SlotContents>& groups = slots_[static_cast<size_t>(owner)][home];
  absl::Status status;
  for (size_t g = 0; g < groups.size() && status.ok(); ++g) {
    if (plan_.groups[g].q_heads() == 0) continue;
    for (const Expected& wanted : expected) {
      groups[g].Visit(wanted.rows, [&](const RowRange& part, const Segment& segment) {
        if (segment.added == wanted.added) return true;
        size_t k = 0;
        while (segment.added.Has(k) == wanted.added.Has(k)) ++k;
        status = absl::FailedPreconditionError(
            absl::StrCat(plan_.name, ": ", Name(payload), " of ", RowsText({owner, part}), " for head group ",
                         g, " ends ", segment.added.Has(k) ? "with" : "without", " the part of chunk ", k));
        return false;
      });
    }
  }
  return status;
}

absl::Status PlanContents::CheckResult() const {
  for (size_t g = 0; g < plan_.groups.size(); ++g) {
    if (plan_.groups[g].q_heads() > 0) ANNULUS_RETURN_IF_ERROR(CheckComputed(static_cast<int>(g)));
  }
  const bool forward = plan_.pass == Pass::kForward;
  for (size_t chunk = 0; chunk < chunks_; ++chunk) {
    const int owner = plan_.problem.chunks[chunk].owner;
    ANNULUS_RETURN_IF_ERROR(
        CheckHome(forward ? Payload::kOutput : Payload::kQueryGrad, owner, ExpectedOfQueries(chunk)));
    if (!forward) ANNULUS_RETURN_IF_ERROR(CheckHome(Payload::kKvGrad, owner, ExpectedOfKeys(chunk)));
  }
  return absl::OkStatus();
}

}  // namespace annulus
