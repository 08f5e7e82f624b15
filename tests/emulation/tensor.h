#pragma once

// The copy engine (kernels/common/hopper.cuh, hopper_add.cuh), emulated: boxes of tensor maps to and from
// shared memory with the 128-byte swizzle, at random times after they are started. Sums read shared memory at
// one random time and are added at a later one.

#include <cuda.h>

#include <cstdint>

namespace annulus::kernels {

void LoadTile(uint32_t tile, const CUtensorMap& map, uint32_t barrier, int row, int panel, int item);
void StoreTile(const CUtensorMap& map, uint32_t tile, int row, int panel, int item);
void AddTile(const CUtensorMap& map, uint32_t tile, int row, int panel, int item);
inline void PrefetchMap(const CUtensorMap&) {}

void BulkAdd(float* global, uint32_t shared, int bytes);
void BulkCommit();
void BulkWaitRead();
void BulkWait();

inline void BulkFenceGlobal() {}
inline int LoadAcquire(const int* flag) { return *flag; }
inline void StoreRelease(int* flag, int value) { *flag = value; }

}  // namespace annulus::kernels
