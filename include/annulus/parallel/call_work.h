#pragma once

// What a call of a block kernel does, for its price: unmasked (query, key) pairs, or, where the kernel is
// known to skip what is masked by tiles, the pairs of the tiles that it visits.
//
//   keys ->    . . x x x .       documents: a tile that any of its queries needs is computed whole, and
//   queries    . . x x x x       a thread block takes one row of tiles
//              . . . . x x

#include <vector>

#include "annulus/comm/exchange_plan.h"
#include "annulus/ops/attention.h"
#include "annulus/ops/attention_tiles.h"

namespace annulus {

// The tiles of a kernel for heads of that dimension; of single pairs where they are not known.
AttentionTiles TilesOf(AttentionKernel kernel, Pass pass, int64_t head_dim);

// The keys that a tile of queries sees: rows of the call, the range around all.
using QueryTileKeys = RowRange;

// Pairs of a call for so many heads, from what each of its tiles of queries sees. Where walks are not cut,
// the device is done when the last one is. Started in any order, that is between sum / device and sum /
// device + longest (Graham 1966), and not before the longest could be: in the middle, as pairs of the whole
// device,
//   max(sum + device * longest / 2, device * longest)        device: walks that it runs at a time
double WorkOf(const AttentionTiles& tiles, int multiprocessors, int64_t heads,
              const std::vector<QueryTileKeys>& call);

}  // namespace annulus
