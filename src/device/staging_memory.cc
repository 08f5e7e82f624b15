#include <algorithm>
#include <bit>

#include "annulus/device/context.h"

namespace annulus {

// The smallest that is free and large enough: a large piece is kept for what needs it.
StagingMemory::Piece& StagingMemory::FreePiece(int64_t bytes) {
  constexpr int64_t kLeastBytes = int64_t{64} << 10;  // most uploads are token ids and mask bounds
  Piece* best = nullptr;
  for (Piece& piece : pieces_) {
    const bool smaller = best == nullptr || piece.memory.bytes() < best->memory.bytes();
    if (piece.memory.bytes() >= bytes && smaller && piece.sent.Done()) best = &piece;
  }
  if (best != nullptr) return *best;
  const uint64_t rounded = std::bit_ceil(static_cast<uint64_t>(std::max(bytes, kLeastBytes)));
  pieces_.push_back({PinnedBuffer(device_, static_cast<int64_t>(rounded)), Event(device_)});
  return pieces_.back();
}

void StagingMemory::Send(int64_t bytes, StreamHandle stream,
                         const std::function<void(void* pinned)>& fill_and_enqueue) {
  Piece& piece = FreePiece(bytes);
  fill_and_enqueue(piece.memory.data());
  piece.sent.Record(stream);
}

int64_t StagingMemory::capacity_bytes() const {
  int64_t bytes = 0;
  for (const Piece& piece : pieces_) bytes += piece.memory.bytes();
  return bytes;
}

}  // namespace annulus
