#pragma once

// What every slot holds while a plan runs, symbolically: for each row which row of which block it is and, for
// results, which chunks have been added to it: key chunks to an output or a query's gradient, query chunks to
// a gradient of keys. (A row lies in one chunk, so those chunks say which pairs it has.)
//
// A home result of all heads has this for each head group.

#include <algorithm>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "annulus/comm/exchange_plan.h"

namespace annulus {

class ChunkSet {
 public:
  ChunkSet() = default;  // of no chunks
  explicit ChunkSet(size_t chunks) : words_((chunks + 63) / 64) {}
  bool Has(size_t chunk) const { return (words_[chunk / 64] >> (chunk % 64) & 1) != 0; }
  void Add(size_t chunk) { words_[chunk / 64] |= uint64_t{1} << (chunk % 64); }
  bool Meets(const ChunkSet& other) const;
  void Add(const ChunkSet& other);
  friend bool operator==(const ChunkSet&, const ChunkSet&) = default;

 private:
  absl::InlinedVector<uint64_t, 4> words_;
};

// The rows of a slot, in segments.
class SlotContents {
 public:
  static constexpr int64_t kNothing = -1;
  // rows.begin holds row `first` of the group (block * block_rows + row in it), and so on; or nothing.
  struct Segment {
    RowRange rows;
    int64_t first = kNothing;
    ChunkSet added = {};
    int64_t FirstAt(int64_t row) const { return first == kNothing ? kNothing : first + row - rows.begin; }
  };

  explicit SlotContents(Segment all) : segments_{std::move(all)} {}

  // Calls fn(part, segment) for the part of `rows` that lies in each segment, until it returns false.
  template <typename Fn>
  void Visit(const RowRange& rows, const Fn& fn) const {
    for (size_t i = Find(rows.begin); i < segments_.size() && segments_[i].rows.begin < rows.end; ++i) {
      const RowRange part{std::max(rows.begin, segments_[i].rows.begin),
                          std::min(rows.end, segments_[i].rows.end)};
      if (!fn(part, segments_[i])) return;
    }
  }
  // What `rows` hold.
  std::vector<Segment> Read(const RowRange& rows) const;
  // Segments that are `rows` in order.
  void Write(const RowRange& rows, std::vector<Segment> segments);
  // For changes in place: the segments of `rows` after splitting at both ends.
  struct Slice {
    Segment *first, *last;
    Segment* begin() const { return first; }
    Segment* end() const { return last; }
  };
  Slice Cut(const RowRange& rows);

 private:
  size_t Find(int64_t row) const;  // the segment that has it; their number for the end
  size_t SplitAt(int64_t row);     // the segment that then begins there

  std::vector<Segment> segments_;  // in order, covering the slot
};

class PlanContents {
 public:
  // Home operands hold their block, home results are empty. The plan's form is right.
  explicit PlanContents(const ExchangePlan& plan);

  // FailedPrecondition if the step does not find what it needs.
  absl::Status Compute(int cp_rank, size_t step);
  absl::Status Move(int from_rank, size_t send, int to_rank, size_t receive);

  // FailedPrecondition unless all pairs were computed for all heads and home results are complete.
  absl::Status CheckResult() const;

 private:
  using Segment = SlotContents::Segment;
  struct Place {
    int cp_rank = 0;
    size_t step = 0;
  };
  const Step& StepAt(const Place& at) const;
  const SlotSpec& SpecOf(const Place& at, int slot) const;
  // What the slot holds for heads of `group`.
  SlotContents& ContentsOf(const Place& at, int slot, int group);
  int64_t FirstRow(const BlockRows& rows) const {
    return rows.block * plan_.problem.block_rows + rows.rows.begin;
  }
  RowRange InSlot(const Place& at, int slot, const BlockRows& rows) const;

  absl::Status Attend(const Place& at);
  absl::Status AttendPair(const Place& at, const BlockPair& pair);
  void Empty(const Place& at, int slot, const std::vector<BlockRows>& list);
  absl::Status Add(const Place& at, int slot, const BlockRows& rows, size_t chunk);
  absl::Status CheckHeld(const Place& at, int slot, int group, const BlockRows& rows);
  absl::Status CopyRows(const Place& from, int from_slot, const Place& to, int to_slot);
  absl::Status Reduce(const Place& at);

  absl::Status CheckComputed(int group) const;
  // What rows of a home result must have.
  struct Expected {
    RowRange rows;
    ChunkSet added;
  };
  absl::Status CheckHome(Payload payload, int owner, const std::vector<Expected>& expected) const;
  std::vector<Expected> ExpectedOfQueries(size_t chunk) const;
  std::vector<Expected> ExpectedOfKeys(size_t chunk) const;

  absl::Status Wrong(const Place& at, const std::string& what) const;

  const ExchangePlan& plan_;
  const size_t chunks_;
  // [rank][slot][group]; one for all groups but in home results of all heads
  std::vector<std::vector<std::vector<SlotContents>>> slots_;
  std::vector<ChunkSet> computed_;  // [group * chunks + q chunk]: KV chunks
};

}  // namespace annulus
