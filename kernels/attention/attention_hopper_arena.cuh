#pragma once

// Forward of attention_hopper_arena.h: the warpgroups of attention_hopper_forward.cuh with another loader.
//
// A stay of a tile in a thread block is over all chunks that are there and that it has not seen; they follow
// each other with O in registers. A tile that misses some then rests in the carry, and its index goes to the
// end of a queue; thread blocks take all tiles once and then what is in the queue, until every tile has begun
// its last stay. A tile that finds none of its chunks the first time goes there at once; in the queue's turn,
// its thread block waits.
//
//   rows of a stay: stored by the warpgroups -> counted in `stored` -> queue[tail] -> loader of the next stay
//   -> warpgroups; each -> is a release and an acquire, so that the last sees the first.
//
// The warpgroups store a tile in the first step of the next one. Before a loader waits it hands over a pause,
// a work without a tile, at which they store what they have; a pause behind a pause is the end.
//
// Nothing waits in a circle: flags are raised without this kernel's help, who waits for one holds nothing
// that others wait for but its tile, and who waits for a place of the queue holds nothing.

#include <limits>

#include "kernels/attention/attention_hopper_arena.h"
#include "kernels/attention/attention_hopper_forward_launch.cuh"
#include "kernels/common/arrival.cuh"
#include "kernels/common/hopper_add.cuh"

namespace annulus::kernels {

// Tiles by index: (head of all items) * query_tiles + query tile. All but `needed` begin as zeros.
struct ArenaState {
  const uint64_t* needed;  // [batch, query_tiles], the chunks that some row sees
  uint64_t* seen;          // [tiles], the chunks of all stays so far, the one at work too
  int* stored;             // [tiles], warpgroups that have put their rows into the carry, in all stays
  // [chunks * tiles], 1 + the tile; 0: not there yet. A tile comes once without having seen a chunk, and
  // after each stay but the last.
  int* queue;
  int* next;      // the first place that no thread block has taken: of all tiles, then of the queue
  int* tail;      // the first place of the queue that no tile has taken
  int* finished;  // tiles that have begun their last stay
};

struct ArenaFlag {
  const uint32_t* arrived;
  uint32_t awaited;
  int first_row;
};

// tables: ranges and bounds are [chunks, batch, ...], in rows of the chunk.
struct HopperArenaArguments : HopperForwardArguments {
  ArenaState state;
  ArenaFlag chunks[kMaxHopperArenaChunks];
  uint64_t arrived;  // chunks that are there from the start
  int64_t patience_ns;
  int count;  // of chunks
  int4* report;
};

// What the host makes of the arena before the launch for tiles of `tile_rows` query rows; the maps are left.
cudaError_t FillArenaTables(const HopperAttentionArena& arena, int tile_rows, void* workspace,
                            HopperArenaArguments* arguments, cudaStream_t stream);

using HopperArenaLauncher = cudaError_t(const HopperAttentionArena& arena,
                                        const HopperAttentionPartial& partial, void* workspace,
                                        cudaStream_t stream);
HopperArenaLauncher HopperArenaDim64, HopperArenaDim128, HopperArenaDim192;

__device__ inline int TileIndex(const HopperArenaArguments& arguments, const ForwardTileIndex& at) {
  return (at.item * arguments.order.heads + at.head) * arguments.order.query_tiles + at.query_tile;
}

__device__ inline void Enqueue(const ArenaState& state, int tile) {
  StoreRelease(&state.queue[atomicAdd(state.tail, 1)], tile + 1);
}

// By one thread of each warpgroup whose rows are in the carry, behind a barrier of the warpgroup.
template <typename Tile>
__device__ void PutBack(const HopperArenaArguments& arguments, const ForwardTileIndex& at) {
  const int tile = TileIndex(arguments, at);
  const int before = AddAcquireRelease(&arguments.state.stored[tile], 1);
  if ((before + 1) % Tile::kGroups == 0) Enqueue(arguments.state, tile);
}

// Of one thread.
template <typename Tile>
class ForwardLoader<Tile, ForwardMode::kArena> : ForwardCopies<Tile> {
 public:
  __device__ ForwardLoader(const HopperArenaArguments& arguments, const ForwardShared<Tile>& shared)
      : ForwardCopies<Tile>(arguments, shared),
        arguments_(arguments),
        state_(arguments.state),
        arrived_(arguments.arrived) {}

  __device__ void Run() {
    Stay stay;
    while (Take(&stay)) Load(stay);
    Pause();
    HandOver(NoTile());
  }

 private:
  struct Stay {
    ForwardTileIndex at;
    uint64_t chunks;
    bool carried, unfinished;
  };
  static constexpr unsigned kNapNs = 200;

  // The next stay, with a chunk at least unless its tile sees none; false when every tile has begun its last.
  __device__ bool Take(Stay* stay) {
    const ForwardOrder& order = arguments_.order;
    for (;;) {
      const int place = atomicAdd(state_.next, 1);
      const bool first_time = place < order.tiles;
      if (first_time) {
        stay->at = TileAt(order, arguments_.tables.order, place, arguments_.all_heads);
      } else {
        const int queued = WaitForTile(place - order.tiles);
        if (queued < 0) return false;
        const int head = queued / order.query_tiles, item = head / order.heads;
        stay->at = {item, head - item * order.heads, queued - head * order.query_tiles};
      }
      const int tile = TileIndex(arguments_, stay->at);
      const uint64_t seen = first_time ? 0 : state_.seen[tile];
      const uint64_t missing = state_.needed[stay->at.item * order.query_tiles + stay->at.query_tile] & ~seen;
      Look(missing);
      if (missing != 0 && (missing & arrived_) == 0) {
        if (first_time) {
          Enqueue(state_, tile);
          continue;
        }
        WaitForChunk(missing);
      }
      stay->chunks = missing & arrived_;
      stay->carried = seen != 0;
      stay->unfinished = stay->chunks != missing;
      state_.seen[tile] = seen | stay->chunks;
      if (!stay->unfinished) atomicAdd(state_.finished, 1);
      return true;
    }
  }

  // -1 when no more will come.
  __device__ int WaitForTile(int place) {
    if (place >= arguments_.count * arguments_.order.tiles) return -1;  // behind the queue's end
    // Others wait for flags in the meantime, for each chunk no longer than their patience.
    const int64_t patience = arguments_.patience_ns * (arguments_.count + 1);
    const uint64_t start = Nanoseconds();
    for (;;) {
      if (const int tile = LoadAcquire(&state_.queue[place]) - 1; tile >= 0) return tile;
      if (LoadAcquire(state_.finished) == arguments_.order.tiles) return -1;
      Pause();
      const auto waited = static_cast<int64_t>(Nanoseconds() - start);
      if (waited > patience) GiveUp({kHopperArenaStuck, 0, 0, Milliseconds(waited)});
      __nanosleep(kNapNs);
    }
  }

  __device__ void WaitForChunk(uint64_t missing) {
    Pause();
    const uint64_t start = Nanoseconds();
    for (;;) {
      Look(missing);
      if ((missing & arrived_) != 0) return;
      const auto waited = static_cast<int64_t>(Nanoseconds() - start);
      if (waited > arguments_.patience_ns) {
        const int chunk = __ffsll(static_cast<long long>(missing)) - 1;
        const ArenaFlag& flag = arguments_.chunks[chunk];
        GiveUp({chunk, static_cast<int>(LoadFlag(flag.arrived)), static_cast<int>(flag.awaited),
                Milliseconds(waited)});
      }
      __nanosleep(kNapNs);
    }
  }

  __device__ static int Milliseconds(int64_t ns) { return static_cast<int>(ns / 1'000'000); }
  __device__ void GiveUp(int4 report) {
    if (arguments_.report != nullptr) StoreToHost(arguments_.report, report);
    __trap();
  }

  // Which of these chunks are there.
  __device__ void Look(uint64_t chunks) {
    uint64_t found = 0;
    for (uint64_t left = chunks & ~arrived_; left != 0; left &= left - 1) {
      const int chunk = __ffsll(static_cast<long long>(left)) - 1;
      const ArenaFlag& flag = arguments_.chunks[chunk];
      if (static_cast<int32_t>(LoadFlag(flag.arrived) - flag.awaited) >= 0) found |= uint64_t{1} << chunk;
    }
    if (found == 0) return;
    AcquireArrivals();
    arrived_ |= found;
  }

  __device__ void Load(const Stay& stay) {
    const ForwardTileIndex& at = stay.at;
    const int kv_head = at.head / arguments_.heads_per_kv;
    uint64_t left = stay.chunks;
    int values = -1;  // the row of the arena of the key tile before
    for (bool begins = true; begins || left != 0; begins = false) {
      const int chunk = left == 0 ? 0 : __ffsll(static_cast<long long>(left)) - 1;
      left &= left - 1;
      ForwardWork work{at, ForwardPart::Of(chunk, left != 0, stay.carried, stay.unfinished), {}};
      const int table = chunk * arguments_.batch + at.item;
      if (stay.chunks != 0) {
        work.keys = arguments_.tables.bounds[int64_t{table} * arguments_.order.query_tiles + at.query_tile];
      }
      HandOver(work);
      if (begins) this->LoadQueries(at);
      const int first = arguments_.chunks[chunk].first_row;
      int key = work.keys.begin;
      do {
        this->LoadKeys(first + key, kv_head, at.item);
        if (values >= 0) this->LoadValues(values, kv_head, at.item);
        values = first + key;
        key += Tile::kKeys;
      } while (key < work.keys.end);
    }
    this->LoadValues(values, kv_head, at.item);
  }

  // The warpgroups store all they have.
  __device__ void Pause() {
    if (!paused_) HandOver(NoTile());
  }
  __device__ static ForwardWork NoTile() { return {{0, 0, -1}, {}, {0, 0, 0, 0}}; }
  __device__ void HandOver(const ForwardWork& work) {
    ForwardCopies<Tile>::HandOver(work);
    paused_ = work.at.query_tile < 0;
  }

  const HopperArenaArguments& arguments_;
  const ArenaState& state_;
  uint64_t arrived_;    // chunks that were seen to be there
  bool paused_ = true;  // the work handed over last is no tile
};

template <typename Tile>
cudaError_t LaunchHopperArena(const HopperAttentionArena& arena, const HopperAttentionPartial& partial,
                              void* workspace, cudaStream_t stream) {
  HopperArenaArguments arguments{};
  cudaError_t error = MakeForwardArguments<Tile>(arena.block, partial, &arguments);
  if (error != cudaSuccess) return error;
  arguments.k_rows = std::numeric_limits<int>::max();  // behind a chunk's rows may be anything
  error = FillArenaTables(arena, Tile::kQueries, workspace, &arguments, stream);
  if (error != cudaSuccess) return error;
  return LaunchHopperForwardMode<Tile, ForwardMode::kArena>(arguments, stream);
}

}  // namespace annulus::kernels
