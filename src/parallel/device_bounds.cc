#include "annulus/parallel/device_bounds.h"

#include <algorithm>
#include <limits>

#include "annulus/device/transfer.h"

namespace annulus {
namespace {

constexpr int64_t kAllKeys =
    std::numeric_limits<int64_t>::max() / 2;  // above every position, far from overflow

}  // namespace

void DeviceBounds::Fill(Context& ctx, int64_t batch, const std::vector<std::vector<AttendCall>>& calls,
                        const std::function<BoundsTable(const SlotBlock&)>& bounds_of) {
  batch_ = batch;
  masks_.clear();
  int64_t rows = 0;  // of the largest call without a mask
  for (const std::vector<AttendCall>& of_step : calls) {
    for (const AttendCall& call : of_step) {
      if (call.bounds != BoundsSource::kMask) rows = std::max(rows, call.q_rows.size());
    }
  }
  everything_ = rows * batch, index_ = 2 * rows * batch;
  std::vector<int64_t> table(static_cast<size_t>(index_), 0);
  std::fill(table.begin() + everything_, table.end(), kAllKeys);
  for (int64_t row = 0; row < rows; ++row) table.insert(table.end(), static_cast<size_t>(batch), row + 1);
  for (const std::vector<AttendCall>& of_step : calls) {
    for (const AttendCall& call : of_step) {
      if (call.bounds != BoundsSource::kMask || masks_.count(call.queries) > 0) continue;
      const BoundsTable mask = bounds_of(call.queries);
      const auto lo = static_cast<int64_t>(table.size());
      masks_[call.queries] = {.lo = lo, .hi = lo + static_cast<int64_t>(mask.lo.size())};
      table.insert(table.end(), mask.lo.begin(), mask.lo.end());
      table.insert(table.end(), mask.hi.begin(), mask.hi.end());
    }
  }
  const auto elements = static_cast<int64_t>(table.size());
  if (elements == 0) return;
  if (!table_.ref().defined() || table_.ref().elements() < elements) {
    table_ = Tensor(ctx.device, DType::kI64, {elements});
  }
  const TensorRef used = table_.ref().Rows(0, elements);
  Upload(ctx, table.data(), used.bytes(), used);
}

MaskBounds DeviceBounds::Rows(int64_t lo, int64_t hi, const RowRange& rows) const {
  const auto part = [&](int64_t begin) {
    return table_.ref().Rows(begin + rows.begin * batch_, begin + rows.end * batch_);
  };
  return {part(lo), part(hi)};
}

MaskBounds DeviceBounds::Of(const AttendCall& call) const {
  const RowRange from_zero{0, call.q_rows.size()};
  switch (call.bounds) {
    case BoundsSource::kMask: {
      const auto place = masks_.find(call.queries);
      ANNULUS_CHECK(place != masks_.end()) << "bounds of block " << call.queries.index << " were not made";
      return Rows(place->second.lo, place->second.hi, call.q_rows);
    }
    case BoundsSource::kEverything:
      return Rows(0, everything_, from_zero);
    case BoundsSource::kIndex:
      return Rows(0, index_, from_zero);
  }
  return {};
}

}  // namespace annulus
