#include "annulus/parallel/call_work.h"

#include <algorithm>

namespace annulus {

AttentionTiles TilesOf(AttentionKernel kernel, Pass pass, int64_t head_dim) {
  const bool forward = pass == Pass::kForward;
  if (kernel == AttentionKernel::kHopper)
    return forward ? HopperForwardTiles(head_dim) : HopperBackwardTiles(head_dim);
  if (kernel != AttentionKernel::kTensorCore) return {};
  return forward ? TensorCoreForwardTiles(head_dim) : TensorCoreBackwardTiles(head_dim);
}

double WorkOf(const AttentionTiles& tiles, int multiprocessors, int64_t heads,
              const std::vector<QueryTileKeys>& call) {
  double sum = 0, longest = 0;
  for (const QueryTileKeys& keys : call) {
    if (keys.empty()) continue;
    const int64_t first = keys.begin / tiles.keys, end = (keys.end - 1) / tiles.keys + 1;
    // Rows that a tile is short of cost as much as others.
    const double walk = static_cast<double>(tiles.queries * (end - first) * tiles.keys);
    sum += walk;
    longest = std::max(longest, walk);
  }
  longest *= static_cast<double>(tiles.walks_per_multiprocessor * multiprocessors);
  return std::max(sum * static_cast<double>(heads) + longest / 2, longest);
}

}  // namespace annulus
