#include "annulus/parallel/attend_calls.h"

#include <algorithm>
#include <map>
#include <optional>
#include <tuple>

#include "annulus/base/check.h"

namespace annulus {
namespace {

// Rows of a slot, at positions position, position + stride, ...
struct Run {
  RowRange rows;
  int64_t position = 0;
};
using Runs = std::vector<Run>;  // without gaps between their rows

RowRange HullOf(const Runs& runs) { return {runs.front().rows.begin, runs.back().rows.end}; }

// Queries and keys that one call could take: it computes what the mask allows of them, which is `pairs`, all
// of them pairs of the step.
struct Rectangle {
  Runs q, keys;
  int64_t pairs = 0;
};

class CallMaker {
 public:
  CallMaker(const SequenceLayout& layout, const SequenceBatch& sequences, const ExchangePlan& plan,
            int cp_rank, const Attend& attend)
      : sequences_(sequences),
        plan_(plan),
        attend_(attend),
        q_slot_(SlotOf(cp_rank, attend.q_slot)),
        kv_slot_(SlotOf(cp_rank, attend.kv_slot)),
        stride_(layout.chunks(0).front().stride) {}

  std::vector<AttendCall> Make() const {
    if (attend_.pairs.empty()) return {};
    const std::optional<Rectangle> all = UnionOfAll();
    if (all.has_value() && ShapeOf(*all) != MaskShape::kGeneral) return {CallOf(*all)};
    // All at once, as by a kernel that takes keys as they come.
    if (attend_.arrival == KeyArrival::kDuring && all.has_value() && Joined(all->keys)) return {CallOf(*all)};
    std::vector<Rectangle> parts;
    for (const BlockPair& pair : attend_.pairs) parts.push_back(PartOf(pair));
    // Where a call with bounds is needed anyway, it may as well take everything: kernels skip what is masked.
    const bool any_general = std::any_of(parts.begin(), parts.end(), [this](const Rectangle& part) {
      return ShapeOf(part) == MaskShape::kGeneral;
    });
    if (any_general && all.has_value() && Joined(all->keys)) return {CallOf(*all)};
    Merge(&parts);
    std::vector<AttendCall> calls;
    for (const Rectangle& part : parts) calls.push_back(CallOf(part));
    return calls;
  }

 private:
  const SlotSpec& SlotOf(int cp_rank, int slot) const {
    return plan_.ranks[static_cast<size_t>(cp_rank)].slots[static_cast<size_t>(slot)];
  }
  const Chunk& ChunkAt(int chunk) const { return plan_.problem.chunks[static_cast<size_t>(chunk)]; }

  Run RunOf(const SlotSpec& slot, int chunk_index, const RowRange& rows) const {
    const Chunk& chunk = ChunkAt(chunk_index);
    const int64_t begin = RowInSlot(plan_, slot, {chunk.owner, rows});
    return {.rows = {begin, begin + rows.size()},
            .position = chunk.position + stride_ * (rows.begin - chunk.rows.begin)};
  }
  Rectangle PartOf(const BlockPair& pair) const {
    return {.q = {RunOf(q_slot_, pair.q_chunk, ChunkAt(pair.q_chunk).rows)},
            .keys = {RunOf(kv_slot_, pair.kv_chunk, pair.keys)},
            .pairs = pair.pairs};
  }

  // Whether all positions are in one affine sequence.
  bool Joined(const Runs& runs) const {
    for (size_t i = 1; i < runs.size(); ++i) {
      if (runs[i].position != runs[i - 1].position + stride_ * runs[i - 1].rows.size()) return false;
    }
    return true;
  }
  bool SamePositions(const Runs& a, const Runs& b) const {
    int64_t last = -1;
    for (size_t i = 0; i < a.size(); ++i) {
      if (b.size() != a.size() || a[i].position != b[i].position || a[i].rows.size() != b[i].rows.size() ||
          a[i].position <= last) {
        return false;
      }
      last = a[i].position + stride_ * (a[i].rows.size() - 1);
    }
    return true;
  }

  // By counting. Where no query sees a key after itself and query row i comes at or after just the first
  // i + 1 keys, it cannot see others: as many pairs as a triangle has are that triangle.
  MaskShape ShapeOf(const Rectangle& r) const {
    const int64_t queries = HullOf(r.q).size(), keys = HullOf(r.keys).size();
    if (r.pairs == sequences_.batch * queries * keys) return MaskShape::kFull;
    if (sequences_.visibility != Visibility::kCausal || queries != keys ||
        r.pairs != sequences_.batch * (queries * (queries + 1) / 2)) {
      return MaskShape::kGeneral;
    }
    const int64_t ahead = r.q.front().position - r.keys.front().position;
    const bool next_to = Joined(r.q) && Joined(r.keys) && 0 <= ahead && ahead < stride_;
    return next_to || SamePositions(r.q, r.keys) ? MaskShape::kCausal : MaskShape::kGeneral;
  }

  AttendCall CallOf(const Rectangle& r) const {
    AttendCall call{.queries = SlotBlockOf(plan_, q_slot_.span, ChunkAt(attend_.pairs[0].q_chunk).owner),
                    .q_rows = HullOf(r.q),
                    .keys = HullOf(r.keys),
                    .shape = ShapeOf(r),
                    .bounds = BoundsSource::kMask,
                    .key_positions = {}};
    if (call.shape == MaskShape::kFull) call.bounds = BoundsSource::kEverything;
    if (call.shape == MaskShape::kCausal) call.bounds = BoundsSource::kIndex;
    if (call.shape == MaskShape::kGeneral) {
      ANNULUS_CHECK(Joined(r.keys)) << plan_.name << ": keys at positions that are not affine";
      call.key_positions = {.offset = r.keys.front().position, .stride = stride_};
    }
    return call;
  }

  // The rectangle around all pairs of the step, if the mask allows no other pair inside of it and every row
  // of it belongs to a pair: what lies in the slot between them may be anything, even NaN.
  std::optional<Rectangle> UnionOfAll() const {
    std::vector<int> q_chunks, kv_chunks;
    Rectangle all;
    std::vector<PairKey> named;
    for (const BlockPair& pair : attend_.pairs) {
      all.pairs += pair.pairs;
      named.push_back(KeyOf(pair));
      q_chunks.push_back(pair.q_chunk);
      kv_chunks.push_back(pair.kv_chunk);
    }
    std::sort(named.begin(), named.end());
    for (std::vector<int>* chunks : {&q_chunks, &kv_chunks}) {
      std::sort(chunks->begin(), chunks->end());
      chunks->erase(std::unique(chunks->begin(), chunks->end()), chunks->end());
    }
    for (const int q : q_chunks) {
      for (const int kv : kv_chunks) {
        if (!IsWhole(q, kv, named)) return std::nullopt;
      }
      all.q.push_back(RunOf(q_slot_, q, ChunkAt(q).rows));
    }
    for (const int kv : kv_chunks) all.keys.push_back(RunOf(kv_slot_, kv, KeysOf(kv)));
    for (Runs* runs : {&all.q, &all.keys}) {
      std::sort(runs->begin(), runs->end(),
                [](const Run& a, const Run& b) { return a.rows.begin < b.rows.begin; });
      for (size_t i = 1; i < runs->size(); ++i) {
        if ((*runs)[i].rows.begin != (*runs)[i - 1].rows.end) return std::nullopt;
      }
    }
    return all;
  }

  // Chunks of queries and of keys, and of which keys.
  using PairKey = std::tuple<int, int, int64_t, int64_t>;
  static PairKey KeyOf(const BlockPair& pair) {
    return {pair.q_chunk, pair.kv_chunk, pair.keys.begin, pair.keys.end};
  }

  // Whether the step has all that the mask allows of this pair of chunks. `named`: its pairs, sorted.
  bool IsWhole(int q, int kv, const std::vector<PairKey>& named) const {
    const RowRange& keys = plan_.problem.keys_of(static_cast<size_t>(q), static_cast<size_t>(kv));
    return keys.empty() ||
           std::binary_search(named.begin(), named.end(), PairKey{q, kv, keys.begin, keys.end});
  }

  // Around what the step needs of the chunk.
  RowRange KeysOf(int kv) const {
    RowRange hull;
    for (const BlockPair& pair : attend_.pairs) {
      if (pair.kv_chunk != kv) continue;
      hull = hull.empty()
                 ? pair.keys
                 : RowRange{std::min(hull.begin, pair.keys.begin), std::max(hull.end, pair.keys.end)};
    }
    return hull;
  }

  // Joins what shares one side and is next to each other on the other, where that makes no faster call
  // slower. Super-blocks of many ranks have thousands of parts, so what begins where one ends is looked up.
  void Merge(std::vector<Rectangle>* parts) const {
    Corners corners;
    for (size_t i = 0; i < parts->size(); ++i) corners.Add((*parts)[i], i);
    std::vector<bool> gone(parts->size());
    for (bool merged = true; merged;) {
      merged = false;
      for (size_t i = 0; i < parts->size(); ++i) {
        Rectangle& part = (*parts)[i];
        if (gone[i]) continue;
        for (const size_t j : corners.NextTo(part)) {
          const Rectangle before = part;
          if (!MergeInto((*parts)[j], &part)) continue;
          corners.Remove(before);
          corners.Remove((*parts)[j]);
          corners.Add(part, i);
          gone[j] = true;
          merged = true;
          break;
        }
      }
    }
    std::vector<Rectangle> left;
    for (size_t i = 0; i < parts->size(); ++i) {
      if (!gone[i]) left.push_back(std::move((*parts)[i]));
    }
    *parts = std::move(left);
  }

  // Rectangles by where they begin. They are apart, so no two with the same range on one side begin in the
  // same row of the other.
  class Corners {
   public:
    void Add(const Rectangle& part, size_t number) {
      const RowRange q = HullOf(part.q), keys = HullOf(part.keys);
      by_q_[{q.begin, q.end, keys.begin}] = number;
      by_keys_[{keys.begin, keys.end, q.begin}] = number;
    }
    void Remove(const Rectangle& part) {
      const RowRange q = HullOf(part.q), keys = HullOf(part.keys);
      by_q_.erase({q.begin, q.end, keys.begin});
      by_keys_.erase({keys.begin, keys.end, q.begin});
    }
    // Those that begin where this one ends, in order of their numbers.
    std::vector<size_t> NextTo(const Rectangle& part) const {
      const RowRange q = HullOf(part.q), keys = HullOf(part.keys);
      std::vector<size_t> numbers;
      const auto along_keys = by_q_.find({q.begin, q.end, keys.end});
      if (along_keys != by_q_.end()) numbers.push_back(along_keys->second);
      const auto along_q = by_keys_.find({keys.begin, keys.end, q.end});
      if (along_q != by_keys_.end()) numbers.push_back(along_q->second);
      std::sort(numbers.begin(), numbers.end());
      return numbers;
    }

   private:
    using Place = std::tuple<int64_t, int64_t, int64_t>;  // range of one side, first row of the other
    std::map<Place, size_t> by_q_, by_keys_;
  };

  // `next` begins where `first` ends.
  bool MergeInto(const Rectangle& next, Rectangle* first) const {
    const bool same_q = HullOf(next.q) == HullOf(first->q),
               same_keys = HullOf(next.keys) == HullOf(first->keys);
    const bool along_keys = same_q && HullOf(first->keys).end == HullOf(next.keys).begin;
    const bool along_q = same_keys && HullOf(first->q).end == HullOf(next.q).begin;
    if (!along_keys && !along_q) return false;
    Rectangle both = *first;
    Runs& grown = along_keys ? both.keys : both.q;
    const Runs& more = along_keys ? next.keys : next.q;
    grown.insert(grown.end(), more.begin(), more.end());
    both.pairs += next.pairs;
    if (ShapeOf(both) == MaskShape::kGeneral) {
      const bool general = ShapeOf(*first) == MaskShape::kGeneral && ShapeOf(next) == MaskShape::kGeneral;
      if (!general || !Joined(both.keys)) return false;
    }
    *first = std::move(both);
    return true;
  }

  const SequenceBatch& sequences_;
  const ExchangePlan& plan_;
  const Attend& attend_;
  const SlotSpec& q_slot_;
  const SlotSpec& kv_slot_;
  const int64_t stride_;
};

}  // namespace

SlotBlock SlotBlockOf(const ExchangePlan& plan, Span span, int owner) {
  if (span == Span::kBlock) return {span, owner};
  const int64_t blocks = plan.super_size / plan.problem.block_rows;
  return {span, owner / static_cast<int>(blocks)};
}

std::vector<AttendCall> CallsOf(const SequenceLayout& layout, const SequenceBatch& sequences,
                                const ExchangePlan& plan, int cp_rank, const Attend& attend) {
  return CallMaker(layout, sequences, plan, cp_rank, attend).Make();
}

std::vector<RowRange> RowsInSlot(const ExchangePlan& plan, const SlotSpec& slot,
                                 const std::vector<BlockRows>& rows) {
  std::vector<RowRange> ranges;
  for (const BlockRows& each : rows) {
    if (each.rows.empty()) continue;
    const int64_t begin = RowInSlot(plan, slot, each);
    ranges.push_back({begin, begin + each.rows.size()});
  }
  std::sort(ranges.begin(), ranges.end(),
            [](const RowRange& a, const RowRange& b) { return a.begin < b.begin; });
  std::vector<RowRange> apart;
  for (const RowRange& range : ranges) {
    if (!apart.empty() && range.begin <= apart.back().end) {
      apart.back().end = std::max(apart.back().end, range.end);
    } else {
      apart.push_back(range);
    }
  }
  return apart;
}

BoundsTable BoundsOf(const SequenceLayout& layout, const SequenceBatch& sequences, int64_t window,
                     const ExchangePlan& plan, const SlotBlock& rows) {
  if (rows.span == Span::kBlock) return LocalBounds(layout, sequences, window, rows.index);
  const int64_t batch = sequences.batch;
  BoundsTable table;
  table.lo.resize(static_cast<size_t>(plan.super_size * batch));
  table.hi.resize(table.lo.size());
  const auto blocks = static_cast<int>(plan.super_size / plan.problem.block_rows);
  for (int block = rows.index * blocks; block < (rows.index + 1) * blocks; ++block) {
    const BoundsTable local = LocalBounds(layout, sequences, window, block);
    for (size_t k = 0; k < plan.problem.chunks.size(); ++k) {
      const Chunk& chunk = plan.problem.chunks[k];
      if (chunk.owner != block) continue;
      const int64_t from = chunk.rows.begin * batch, count = chunk.rows.size() * batch,
                    to = plan.super_rows[k] * batch;
      std::copy_n(local.lo.begin() + from, count, table.lo.begin() + to);
      std::copy_n(local.hi.begin() + from, count, table.hi.begin() + to);
    }
  }
  return table;
}

}  // namespace annulus
