#pragma once

// What feeds the forward on Hopper (attention_hopper_forward.cuh): tiles and the order in which thread blocks
// take them, the shared memory of a block, and the thread that has it filled.

#include <algorithm>

#include "kernels/attention/attention_hopper_launch.cuh"
#include "kernels/common/hopper.cuh"

namespace annulus::kernels {

// kWhole: starts from nothing, and only writes `result` and the LSE. kArena: attention_hopper_arena.cuh.
enum class ForwardMode { kWhole, kCarry, kArena };

// Whether warpgroups hand the tensor cores to each other, or take them as they come.
enum class Turns { kInOrder, kAsTheyCome };

template <int kDim_, int kValueDim_, int kGroups_, int kKeys_, int kStages_, int kQueryStages_,
          Turns kTurns_ = Turns::kInOrder>
struct HopperForwardTile {
  static constexpr Turns kTurns = kTurns_;
  static constexpr int kDim = kDim_, kValueDim = kValueDim_, kKeys = kKeys_;
  static constexpr int kGroups = kGroups_;  // of warps that multiply, 64 query rows each
  static constexpr int kQueries = 64 * kGroups;
  static constexpr int kStages = kStages_, kQueryStages = kQueryStages_;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kLoaderRegisters = kGroups == 2 ? 40 : 32, kMathRegisters = kGroups == 2 ? 232 : 160;
  using Q = SharedTile<kQueries, kDim>;
  using K = SharedTile<kKeys, kDim>;
  using V = SharedTile<kKeys, kValueDim>;
  static constexpr int kTileBytes = kQueryStages * Q::kBytes + kStages * (K::kBytes + V::kBytes);

  // Rows of the carry on their way, 8 for each warp and half of its rows, each 8 banks behind the one before:
  // the last halves, as many as there is room for.
  static constexpr int kCarryRowBytes = kValueDim * 4 + 32, kCarryHalfBytes = kQueries / 2 * kCarryRowBytes;
  static constexpr int kSharedLimit = 227 * 1024, kBarrierBytes = 512;
  static constexpr int kStagedHalves =
      std::min(2, (kSharedLimit - kBarrierBytes - kTileBytes) / kCarryHalfBytes);
};

// Tiles in the order in which thread blocks take them: heads whose keys fit into L2 together, one such set
// after the other, and within each the longest tiles first.
struct ForwardOrder {
  int sets_of;  // heads, counted over all items, of a set
  int heads, query_tiles, tiles;
};
struct ForwardTileIndex {
  int item, head, query_tile;
};
__device__ inline ForwardTileIndex TileAt(const ForwardOrder& order, const int* query_tiles, int index,
                                          int all_heads) {
  const int in_set = order.sets_of * order.query_tiles, set = index / in_set;
  const int heads = min(order.sets_of, all_heads - set * order.sets_of), at = index - set * in_set;
  const int rank = at / heads, head = set * order.sets_of + (at - rank * heads);
  const int item = head / order.heads;
  const int query_tile =
      query_tiles == nullptr ? order.query_tiles - 1 - rank : query_tiles[item * order.query_tiles + rank];
  return {item, head - item * order.heads, query_tile};
}

struct HopperForwardArguments {
  CUtensorMap q, k, v;
  ForwardTables tables;
  ForwardOrder order;
  CudaHeads<float> out;
  CudaHeads<__nv_bfloat16> result;
  float* lse;
  int q_rows, k_rows, batch, all_heads, heads_per_kv;
  float scale;  // of scores, in units of log2
};

// Which keys of a tile a work is about, in kArena.
struct ForwardPart {
  int bits;  // in one word, or handing it over costs the other modes
  __device__ static ForwardPart Of(int chunk, bool more, bool carried, bool unfinished) {
    return {chunk << 3 | int{more} << 2 | int{carried} << 1 | int{unfinished}};
  }
  __device__ int chunk() const { return bits >> 3; }
  __device__ bool more() const { return (bits & 4) != 0; }        // the tile goes on with the next work
  __device__ bool carried() const { return (bits & 2) != 0; }     // it starts from the carry
  __device__ bool unfinished() const { return (bits & 1) != 0; }  // ends in it, for more keys will come
};

// A tile as the loader hands it to the warpgroups; query_tile < 0: there are no more. It has one key tile at
// least: of masked keys from 0 on, where its rows see none.
struct alignas(16) ForwardWork {
  ForwardTileIndex at;
  ForwardPart part;
  TileBounds keys;
};

// Tiles between the loader and the warpgroups: the one that waits for its store, the one at work and the
// next.
inline constexpr int kForwardWorks = 4;

template <typename Tile>
struct ForwardBarriers {
  uint64_t q_full[Tile::kQueryStages], q_empty[Tile::kQueryStages];
  uint64_t k_full[Tile::kStages], k_empty[Tile::kStages];
  uint64_t v_full[Tile::kStages], v_empty[Tile::kStages];
  uint64_t work_full[kForwardWorks], work_empty[kForwardWorks];
  ForwardWork work[kForwardWorks];
};
template <typename Tile, ForwardMode kMode>
inline constexpr int kForwardBarriersAt =
    Tile::kTileBytes + (kMode == ForwardMode::kCarry ? Tile::kStagedHalves * Tile::kCarryHalfBytes : 0);
template <typename Tile, ForwardMode kMode>
inline constexpr int kForwardSharedBytes = kForwardBarriersAt<Tile, kMode> +
                                           static_cast<int>(sizeof(ForwardBarriers<Tile>));

// Place of a ring of kCount buffers, with the parity of the phase in which the place is filled.
template <int kCount>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void Advance() {
    if (++stage == kCount) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ uint32_t Of(const uint64_t (&barriers)[kCount]) const {
    return SharedAddress(barriers) + static_cast<uint32_t>(stage * 8);
  }
};

template <typename Tile>
struct ForwardShared {
  uint32_t q, k, v;  // of the first stages
  unsigned char* carry;
  ForwardBarriers<Tile>& barriers;
  __device__ uint32_t Q(int stage) const { return q + static_cast<uint32_t>(stage * Tile::Q::kBytes); }
  __device__ uint32_t K(int stage) const { return k + static_cast<uint32_t>(stage * Tile::K::kBytes); }
  __device__ uint32_t V(int stage) const { return v + static_cast<uint32_t>(stage * Tile::V::kBytes); }
};

// Of one thread: hands tiles over and starts the copies of their operands, each when its buffer is empty.
template <typename Tile>
class ForwardCopies {
 protected:
  __device__ ForwardCopies(const HopperForwardArguments& arguments, const ForwardShared<Tile>& shared)
      : arguments_(arguments), shared_(shared), barriers_(shared.barriers) {}

  __device__ void HandOver(const ForwardWork& work) {
    PhaseBarrierWait(work_place_.Of(barriers_.work_empty), work_place_.parity ^ 1);
    barriers_.work[work_place_.stage] = work;
    PhaseBarrierArrive(work_place_.Of(barriers_.work_full));
    work_place_.Advance();
  }
  __device__ void LoadQueries(const ForwardTileIndex& at) {
    Load<typename Tile::Q>(q_place_, barriers_.q_full, barriers_.q_empty, shared_.q, arguments_.q,
                           at.query_tile * Tile::kQueries, at.head * (Tile::kDim / 64), at.item);
  }
  // Rows of K and V from `key` on.
  __device__ void LoadKeys(int key, int kv_head, int item) {
    Load<typename Tile::K>(k_place_, barriers_.k_full, barriers_.k_empty, shared_.k, arguments_.k, key,
                           kv_head * (Tile::kDim / 64), item);
  }
  __device__ void LoadValues(int key, int kv_head, int item) {
    Load<typename Tile::V>(v_place_, barriers_.v_full, barriers_.v_empty, shared_.v, arguments_.v, key,
                           kv_head * (Tile::kValueDim / 64), item);
  }

 private:
  template <typename Operand, int kCount>
  __device__ static void Load(RingPlace<kCount>& place, const uint64_t (&full)[kCount],
                              const uint64_t (&empty)[kCount], uint32_t first, const CUtensorMap& map,
                              int row, int panel, int item) {
    PhaseBarrierWait(place.Of(empty), place.parity ^ 1);
    PhaseBarrierExpect(place.Of(full), Operand::kBytes);
    LoadTile(first + static_cast<uint32_t>(place.stage * Operand::kBytes), map, place.Of(full), row, panel,
             item);
    place.Advance();
  }

  const HopperForwardArguments& arguments_;
  const ForwardShared<Tile>& shared_;
  ForwardBarriers<Tile>& barriers_;
  RingPlace<Tile::kQueryStages> q_place_;
  RingPlace<Tile::kStages> k_place_, v_place_;
  RingPlace<kForwardWorks> work_place_;
};

// Takes tiles, in the order in which the warpgroups use them.
template <typename Tile, ForwardMode kMode>
class ForwardLoader : ForwardCopies<Tile> {
 public:
  __device__ ForwardLoader(const HopperForwardArguments& arguments, const ForwardShared<Tile>& shared)
      : ForwardCopies<Tile>(arguments, shared), arguments_(arguments), index_(static_cast<int>(blockIdx.x)) {}

  __device__ void Run() {
    ForwardWork work = Take();
    while (work.at.query_tile >= 0) {
      this->HandOver(work);
      this->LoadQueries(work.at);
      const int kv_head = work.at.head / arguments_.heads_per_kv;
      int key = work.keys.begin;
      this->LoadKeys(key, kv_head, work.at.item);
      const ForwardWork next = Take();  // while the copies run
      for (; key + Tile::kKeys < work.keys.end; key += Tile::kKeys) {
        this->LoadKeys(key + Tile::kKeys, kv_head, work.at.item);
        this->LoadValues(key, kv_head, work.at.item);
      }
      this->LoadValues(key, kv_head, work.at.item);
      work = next;
    }
    this->HandOver(work);
  }

 private:
  // The next tile with something to do.
  __device__ ForwardWork Take() {
    const ForwardOrder& order = arguments_.order;
    for (;;) {
      const int index = index_;
      if (index >= order.tiles) return {{0, 0, -1}, {}, {0, 0, 0, 0}};
      index_ = static_cast<int>(gridDim.x) + atomicAdd(arguments_.tables.next, 1);
      ForwardWork work{};
      work.at = TileAt(order, arguments_.tables.order, index, arguments_.all_heads);
      work.keys = arguments_.tables.bounds[work.at.item * order.query_tiles + work.at.query_tile];
      if (work.keys.empty()) {
        if (arguments_.result.data == nullptr) continue;
        work.keys.begin = work.keys.end = 0;
      }
      return work;
    }
  }

  const HopperForwardArguments& arguments_;
  int index_;  // of the tile to look at next
};

}  // namespace annulus::kernels
