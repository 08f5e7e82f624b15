#include "annulus/parallel/attend_calls.h"

#include <algorithm>
#include <limits>
#include <optional>

#include "annulus/device/transfer.h"

namespace annulus {
namespace {

constexpr int64_t kAllKeys =
    std::numeric_limits<int64_t>::max() / 2;  // above every position, far from overflow

// Rows `keys` of the block of chunk `kv_chunk`'s owner.
struct Rectangle {
  RowRange q_rows, keys;
};

size_t ChunksPerRank(const ExchangeProblem& problem) {
  return problem.chunks.size() / static_cast<size_t>(problem.ranks);
}

// Global positions of the block's rows [keys.begin, keys.end), ascending in every layout.
std::vector<int64_t> PositionsOf(const SequenceLayout& layout, int owner, const RowRange& keys) {
  std::vector<int64_t> positions;
  for (int64_t row = keys.begin; row < keys.end; ++row) positions.push_back(layout.PositionOf(owner, row));
  return positions;
}

// Whether positions are offset + stride * j.
std::optional<KeyPositions> AffineOf(const std::vector<int64_t>& positions) {
  KeyPositions affine{.offset = positions.front(), .stride = 1};
  if (positions.size() > 1) affine.stride = positions[1] - positions[0];
  for (size_t j = 0; j < positions.size(); ++j) {
    if (positions[j] != affine.offset + affine.stride * static_cast<int64_t>(j)) return std::nullopt;
  }
  return affine;
}

// What every row of the rectangle sees of its keys, taken as a whole.
MaskShape ShapeOf(const Rectangle& r, const std::vector<int64_t>& positions, const BoundsTable& bounds,
                  int64_t batch) {
  const auto index_of = [&](int64_t position) {
    return std::lower_bound(positions.begin(), positions.end(), position) - positions.begin();
  };
  bool full = true, causal = r.q_rows.size() == r.keys.size();
  for (int64_t i = 0; i < r.q_rows.size() && (full || causal); ++i) {
    for (int64_t item = 0; item < batch; ++item) {
      const size_t token = static_cast<size_t>((r.q_rows.begin + i) * batch + item);
      const int64_t first = index_of(bounds.lo[token]), end = index_of(bounds.hi[token]);
      full = full && first == 0 && end == r.keys.size();
      causal = causal && first == 0 && end == i + 1;
    }
  }
  // One query and one key is both; full needs less.
  return full ? MaskShape::kFull : causal ? MaskShape::kCausal : MaskShape::kGeneral;
}

// The rectangle around all pairs of the step, if the plan has no other pair inside of it.
std::optional<Rectangle> UnionOf(const ExchangeProblem& problem, const Step& step) {
  const BlockPair& first = step.pairs.front();
  Rectangle all{problem.chunks[static_cast<size_t>(first.q_chunk)].rows, first.keys};
  for (const BlockPair& pair : step.pairs) {
    const RowRange& rows = problem.chunks[static_cast<size_t>(pair.q_chunk)].rows;
    all.q_rows = {std::min(all.q_rows.begin, rows.begin), std::max(all.q_rows.end, rows.end)};
    all.keys = {std::min(all.keys.begin, pair.keys.begin), std::max(all.keys.end, pair.keys.end)};
  }
  const size_t per_rank = ChunksPerRank(problem);
  const size_t q_first = static_cast<size_t>(first.q_chunk) / per_rank * per_rank;
  const size_t kv_first = static_cast<size_t>(first.kv_chunk) / per_rank * per_rank;
  for (size_t q = q_first; q < q_first + per_rank; ++q) {
    const RowRange& rows = problem.chunks[q].rows;
    if (rows.end <= all.q_rows.begin || rows.begin >= all.q_rows.end) continue;
    for (size_t kv = kv_first; kv < kv_first + per_rank; ++kv) {
      const bool here = std::any_of(step.pairs.begin(), step.pairs.end(), [&](const BlockPair& pair) {
        return pair.q_chunk == static_cast<int>(q) && pair.kv_chunk == static_cast<int>(kv) &&
               pair.keys == problem.keys_of(q, kv);
      });
      const RowRange& keys = problem.keys_of(q, kv);
      const bool inside = keys.begin < all.keys.end && all.keys.begin < keys.end;
      if (!keys.empty() && inside && !here) return std::nullopt;
    }
  }
  return all;
}

// The call of a rectangle; none if its mask is general and its keys' positions are not affine.
std::optional<AttendCall> CallFor(const SequenceLayout& layout, int owner, const Rectangle& r,
                                  const BoundsTable& bounds, int64_t batch) {
  const std::vector<int64_t> positions = PositionsOf(layout, owner, r.keys);
  AttendCall call;
  call.q_rows = r.q_rows, call.keys = r.keys;
  call.shape = ShapeOf(r, positions, bounds, batch);
  if (call.shape == MaskShape::kFull) call.bounds = BoundsSource::kEverything;
  if (call.shape == MaskShape::kCausal) call.bounds = BoundsSource::kIndex;
  if (call.shape == MaskShape::kGeneral) {
    const std::optional<KeyPositions> affine = AffineOf(positions);
    if (!affine.has_value()) return std::nullopt;
    call.key_positions = *affine;
  }
  return call;
}

}  // namespace

std::vector<AttendCall> CallsOf(const SequenceLayout& layout, const ExchangeProblem& problem,
                                const Step& step, const BoundsTable& bounds, int64_t batch) {
  if (step.pairs.empty()) return {};
  const int owner = problem.chunks[static_cast<size_t>(step.pairs.front().kv_chunk)].owner;
  if (const std::optional<Rectangle> all = UnionOf(problem, step); all.has_value()) {
    const std::optional<AttendCall> call = CallFor(layout, owner, *all, bounds, batch);
    if (call.has_value()) return {*call};
  }
  std::vector<AttendCall> calls;
  for (const BlockPair& pair : step.pairs) {
    const RowRange& rows = problem.chunks[static_cast<size_t>(pair.q_chunk)].rows;
    const std::optional<AttendCall> call = CallFor(layout, owner, {rows, pair.keys}, bounds, batch);
    ANNULUS_CHECK(call.has_value()) << "keys of one chunk at positions that are not affine";
    calls.push_back(*call);
  }
  return calls;
}

DeviceBounds::DeviceBounds(Device device, int64_t rows, int64_t batch)
    : rows_(rows), batch_(batch), table_(device, DType::kI64, {5, rows * batch}) {}

void DeviceBounds::Fill(Context& ctx, const BoundsTable& bounds) {
  const int64_t tokens = rows_ * batch_;
  std::vector<int64_t> table;
  table.reserve(static_cast<size_t>(5 * tokens));
  table.insert(table.end(), bounds.lo.begin(), bounds.lo.end());
  table.insert(table.end(), bounds.hi.begin(), bounds.hi.end());
  table.insert(table.end(), static_cast<size_t>(tokens), 0);
  table.insert(table.end(), static_cast<size_t>(tokens), kAllKeys);
  for (int64_t row = 0; row < rows_; ++row) table.insert(table.end(), static_cast<size_t>(batch_), row + 1);
  Upload(ctx, table.data(), table_.ref().bytes(), table_.ref());
}

MaskBounds DeviceBounds::Of(const AttendCall& call) const {
  const auto rows_of = [&](int64_t array, const RowRange& rows) {
    return table_.ref()
        .Rows(array, array + 1)
        .Reshaped({rows_ * batch_})
        .Rows(rows.begin * batch_, rows.end * batch_);
  };
  const RowRange from_zero{0, call.q_rows.size()};
  switch (call.bounds) {
    case BoundsSource::kMask:
      return {rows_of(0, call.q_rows), rows_of(1, call.q_rows)};
    case BoundsSource::kEverything:
      return {rows_of(2, call.q_rows), rows_of(3, call.q_rows)};
    case BoundsSource::kIndex:
      return {rows_of(2, from_zero), rows_of(4, from_zero)};
  }
  return {};
}

}  // namespace annulus
