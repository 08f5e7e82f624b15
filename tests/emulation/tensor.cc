#include "emulation/tensor.h"

#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulation/block.h"
#include "kernels/common/tensor_map.h"

namespace annulus::kernels {
namespace {

using emulation::AsyncReadsShared;
using emulation::Fail;
using emulation::Later;
using emulation::SharedAt;
using emulation::ThreadLocal;

constexpr int kPanelBytes = 128, kChunkBytes = 16;

// What a tensor map says; strides in bytes.
struct Panels {
  unsigned char* data;
  int64_t rows, batch, panels, row_stride, batch_stride;
  int box_rows, box_panels;
};
static_assert(sizeof(Panels) <= sizeof(CUtensorMap));

template <typename Ref>
cudaError_t Make(const Ref& x, int box_rows, int box_panels, CUtensorMap* map) {
  constexpr int64_t kBytes = sizeof(*x.data);
  const auto usable = [](int64_t count, int64_t stride) {
    return count == 1 || (stride > 0 && stride * kBytes % 16 == 0 && stride * kBytes < int64_t{1} << 40);
  };
  if (x.rows < 1 || x.batch < 1 || x.panels < 1 || box_rows < 1 || box_rows > 256 || box_panels < 1 ||
      box_panels > 256 || reinterpret_cast<uintptr_t>(x.data) % 16 != 0 || !usable(x.rows, x.row_stride) ||
      !usable(x.batch, x.batch_stride)) {
    return cudaErrorInvalidValue;
  }
  const Panels panels{const_cast<unsigned char*>(reinterpret_cast<const unsigned char*>(x.data)),
                      x.rows,
                      x.batch,
                      x.panels,
                      x.row_stride * kBytes,
                      x.batch_stride * kBytes,
                      box_rows,
                      box_panels};
  std::memcpy(static_cast<void*>(map), &panels, sizeof panels);
  return cudaSuccess;
}

// A box of a tensor, and its tile.
struct Box {
  Panels panels;
  uint32_t tile;
  int row, panel, item;

  Box(const CUtensorMap& map, uint32_t tile, int row, int panel, int item)
      : tile(tile), row(row), panel(panel), item(item) {
    std::memcpy(&panels, static_cast<const void*>(&map), sizeof panels);
    if (tile % 1024 != 0) Fail("a tile at shared address " + std::to_string(tile) + ", expected 1024 bytes");
  }

  int64_t bytes() const { return int64_t{panels.box_panels} * panels.box_rows * kPanelBytes; }

  // fn(shared, global) for every 16 bytes; global is null outside of the tensor.
  template <typename Fn>
  void ForEachChunk(Fn&& fn) const {
    for (int p = 0; p < panels.box_panels; ++p) {
      for (int r = 0; r < panels.box_rows; ++r) {
        const bool inside = row >= 0 && row + r < panels.rows && panel >= 0 && panel + p < panels.panels &&
                            item >= 0 && item < panels.batch;
        unsigned char* from = inside ? panels.data + (row + r) * panels.row_stride +
                                           item * panels.batch_stride + int64_t{panel + p} * kPanelBytes
                                     : nullptr;
        for (int chunk = 0; chunk < kPanelBytes / kChunkBytes; ++chunk) {
          const auto linear =
              tile + static_cast<uint32_t>((p * panels.box_rows + r) * kPanelBytes + chunk * kChunkBytes);
          fn(linear ^ ((linear >> 7 & 7) << 4), from == nullptr ? nullptr : from + chunk * kChunkBytes);
        }
      }
    }
  }
};

// Bytes on their way from shared into global memory.
struct Transfer {
  bool read = false, done = false;
};
struct Bulk {
  std::vector<std::shared_ptr<Transfer>> open, committed;
};

void AddFloats(float* to, const unsigned char* from, int bytes) {
  for (int i = 0; i < bytes; i += 4) {
    float x;
    std::memcpy(&x, from + i, sizeof x);
    to[i / 4] += x;
  }
}

// Starts a transfer that `read` takes out of shared memory and what it returns puts into global memory.
void Start(std::function<std::function<void()>()> read) {
  auto transfer = std::make_shared<Transfer>();
  ThreadLocal<Bulk>().open.push_back(transfer);
  Later([transfer, read = std::move(read)] {
    std::function<void()> write = read();
    transfer->read = true;
    Later([transfer, write = std::move(write)] {
      write();
      transfer->done = true;
    });
  });
}

// The box's bytes out of shared memory; to be put into global memory by `put(to, bytes of a chunk)`.
template <typename Put>
void StartBox(const Box& box, Put put) {
  Start([box, put]() -> std::function<void()> {
    struct Chunk {
      unsigned char* to;
      unsigned char bytes[kChunkBytes];
    };
    auto chunks = std::make_shared<std::vector<Chunk>>();
    box.ForEachChunk([&](uint32_t shared, unsigned char* global) {
      AsyncReadsShared("copy out of shared memory", shared, kChunkBytes);
      if (global == nullptr) return;
      chunks->push_back({global, {}});
      std::memcpy(chunks->back().bytes, SharedAt(shared, kChunkBytes), kChunkBytes);
    });
    return [chunks, put] {
      for (const Chunk& chunk : *chunks) put(chunk.to, chunk.bytes);
    };
  });
}

void WaitFor(const char* what, bool Transfer::* state) {
  emulation::WaitUntil(what, [committed = ThreadLocal<Bulk>().committed, state] {
    for (const auto& transfer : committed) {
      if (!((*transfer).*state)) return false;
    }
    return true;
  });
}

}  // namespace

cudaError_t MakeTensorMap(const PanelsRef& x, int box_rows, int box_panels, CUtensorMap* map) {
  return Make(x, box_rows, box_panels, map);
}
cudaError_t MakeTensorMap(const SumPanelsRef& x, int box_rows, int box_panels, CUtensorMap* map) {
  return Make(x, box_rows, box_panels, map);
}

void LoadTile(uint32_t tile, const CUtensorMap& map, uint32_t barrier, int row, int panel, int item) {
  const Box box(map, tile, row, panel, item);
  Later([box, barrier] {
    box.ForEachChunk([](uint32_t shared, const unsigned char* global) {
      unsigned char* to = SharedAt(shared, kChunkBytes);
      if (global != nullptr) {
        std::memcpy(to, global, kChunkBytes);
      } else {
        std::memset(to, 0, kChunkBytes);
      }
    });
    emulation::CompleteBytes(barrier, box.bytes());
  });
}

void StoreTile(const CUtensorMap& map, uint32_t tile, int row, int panel, int item) {
  StartBox(Box(map, tile, row, panel, item),
           [](unsigned char* to, const unsigned char* from) { std::memcpy(to, from, kChunkBytes); });
}

void AddTile(const CUtensorMap& map, uint32_t tile, int row, int panel, int item) {
  StartBox(Box(map, tile, row, panel, item), [](unsigned char* to, const unsigned char* from) {
    AddFloats(reinterpret_cast<float*>(to), from, kChunkBytes);
  });
}

void BulkAdd(float* global, uint32_t shared, int bytes) {
  Start([global, shared, bytes]() -> std::function<void()> {
    AsyncReadsShared("sum out of shared memory", shared, bytes);
    const unsigned char* from = SharedAt(shared, bytes);
    auto values = std::make_shared<std::vector<unsigned char>>(from, from + bytes);
    return [global, values] { AddFloats(global, values->data(), static_cast<int>(values->size())); };
  });
}

void BulkCommit() {
  auto& bulk = ThreadLocal<Bulk>();
  for (auto& transfer : bulk.open) bulk.committed.push_back(std::move(transfer));
  bulk.open.clear();
  std::erase_if(bulk.committed, [](const auto& transfer) { return transfer->done; });
}
void BulkWaitRead() { WaitFor("bulk copies to have read", &Transfer::read); }
void BulkWait() { WaitFor("bulk copies", &Transfer::done); }

}  // namespace annulus::kernels
