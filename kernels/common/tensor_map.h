#pragma once

// Tensor maps: how the copy engine of Hopper (hopper.cuh, LoadTile) finds tiles of heads in device memory.
// Included by *_cuda.cc and *.cu only.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace annulus::kernels {

// [rows, batch, panels, 64] bf16 on the device, on 16 bytes; strides in elements, multiples of 8, below 2^39.
// A panel is 64 columns: head h of `dim` columns starts at panel h * dim / 64.
struct PanelsRef {
  const __nv_bfloat16* data = nullptr;
  int64_t rows = 0, batch = 0, panels = 0;
  int64_t row_stride = 0, batch_stride = 0;
};

// Boxes of box_rows (at most 256) rows of one item and box_panels panels, as SharedTile<box_rows, 64 *
// box_panels> lies in shared memory; rows past the end become zeros. rows, batch and panels are above 0.
cudaError_t MakeTensorMap(const PanelsRef& x, int box_rows, int box_panels, CUtensorMap* map);

// The same of f32 [rows, batch, panels, 32], strides multiples of 4, below 2^38: for sums (hopper_add.cuh).
struct SumPanelsRef {
  float* data = nullptr;
  int64_t rows = 0, batch = 0, panels = 0;
  int64_t row_stride = 0, batch_stride = 0;
};
cudaError_t MakeTensorMap(const SumPanelsRef& x, int box_rows, int box_panels, CUtensorMap* map);

}  // namespace annulus::kernels
