#pragma once

// Block attention (attention_hopper.h) over keys of which some are still on their way: keys and values of a
// layer, of all ranks, arrive in chunks in one buffer, the arena, while one launch computes. It starts with
// the chunks that are there and takes the others as they come, in any order.
//
//   copy stream      chunk 2 | flag 2     chunk 1 | flag 1     chunk 3 | flag 3
//   compute stream   [ tiles x 0, 2, then ... 1, then ... 3 ]            one kernel, no launch in between
//
// Who may write what, when:
//   - the queries, the local chunk and whatever has no flag are complete before the launch in stream order;
//   - a chunk is complete before its flag is raised: a copy, and behind it on its stream
//     cuStreamWriteValue32 to the flag (a 4-byte copy instead is not seen by a running kernel);
//   - between the two any bytes of a chunk may have any value. Rows of the arena outside of chunks may
//     change at any time, and so may chunks that the mask hides from all queries, which are not waited for;
//   - chunks and flags stay as they are until the launch is over.
//
// On an H200: right in all orders of arrival of the lab (attention_hopper_check arena); also run in emulation
// (tests/emulation). Exchange plans that gather keys in an arena use it (PlanKind::kArena).
//
// Chunks must come by copy engines (copies between GPUs or from the host), from work that needs no
// multiprocessor of this GPU: the launch may hold all of them until the last chunk is there, so a kernel that
// brings a chunk, or that the copy is queued behind, would never start. That holds for kernels of NCCL, for
// kernels behind which a stream orders a copy, and for copies within one GPU, which CUDA may do by a kernel.

#include <span>

#include "annulus/device/wait_report.h"
#include "kernels/attention/attention_hopper.h"

namespace annulus::kernels {

// Rows of the arena that arrive together; row j is the key at position key_offset + key_stride * j. Chunks do
// not overlap. Two segments that one copy brings are two chunks with one flag.
struct HopperArenaChunk {
  int64_t first_row = 0, rows = 0;
  int64_t key_offset = 0, key_stride = 1;
  // In device memory. The chunk is there once *arrived - awaited is not negative as a 32-bit integer; null:
  // it is there before the launch.
  const uint32_t* arrived = nullptr;
  uint32_t awaited = 0;
};
inline constexpr int kMaxHopperArenaChunks = 64;

using HopperArenaReport = WaitReport;  // part: the chunk
inline constexpr int32_t kHopperArenaStuck = WaitReport::kStuck;

struct HopperAttentionArena {
  HopperAttentionBlock block;  // k and v are the arena, of k_rows rows; key_offset and key_stride are unused
  std::span<const HopperArenaChunk> chunks{};  // on the host, read during the call; at most 64
  // A thread block that waits for longer with nothing to compute writes the report and traps: the launch
  // ends with an error, after which the process's context on this GPU is lost.
  int64_t patience_ms = 20'000;
  HopperArenaReport* report = nullptr;  // pinned host memory that the device can write, or null
};

int64_t HopperAttentionForwardArenaWorkspaceBytes(const HopperAttentionArena& arena);

// Attention over the keys of all chunks, carried from nothing. partial.out is needed: tiles whose keys are
// not all there rest in it. With partial.result, that gets the output, and what partial.out holds at the end
// is undefined; without, partial.out gets it. partial.lse: that of all keys. Rows without an allowed key
// become 0, with an LSE of -inf. `workspace` is 16-byte aligned.
//
// A tile of queries is stored and loaded once more for each time that it has to be left for want of keys, at
// most once a chunk; with all chunks there nothing is carried. Sums are in the order in which chunks come, so
// results differ by rounding from run to run.
//
// cudaErrorInvalidValue: arguments outside of attention_hopper.h, more chunks than 64, a chunk outside of the
// arena, or 2^31 (tile of 128 queries, head, chunk) or more.
cudaError_t HopperAttentionForwardArena(const HopperAttentionArena& arena,
                                        const HopperAttentionPartial& partial, void* workspace,
                                        cudaStream_t stream);

}  // namespace annulus::kernels
