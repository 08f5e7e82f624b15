#pragma once

// Which keys the tiles of a call's queries see, for its price.

#include <map>
#include <vector>

#include "annulus/parallel/attend_calls.h"
#include "annulus/parallel/call_work.h"
#include "annulus/parallel/choose_plan.h"

namespace annulus {

class KeysSeen {
 public:
  // Both outlive it.
  KeysSeen(const AttentionCase& layer, const ExchangePlan& plan);

  // By each tile of so many queries, of all sequences of the batch.
  std::vector<QueryTileKeys> By(const AttendCall& call, int64_t tile_queries);

 private:
  QueryTileKeys OfTile(const AttendCall& call, const std::vector<int64_t>& positions, const RowRange& queries,
                       int64_t item) const;
  // Global positions of the rows of a slot.
  const std::vector<int64_t>& PositionsOf(const SlotBlock& block);

  const AttentionCase& layer_;
  const ExchangePlan& plan_;
  const int64_t stride_;  // of the layout's positions
  std::map<SlotBlock, std::vector<int64_t>> positions_;
};

}  // namespace annulus
