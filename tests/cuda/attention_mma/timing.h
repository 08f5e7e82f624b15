#pragma once

#include <cstdint>

namespace annulus::testing {

// Times the passes of a causal sequence, batch 1, and compares three query rows of O with double. `variants`
// also times other tilings of the kernels.
void Time(int64_t rows, int64_t heads, int64_t dim, int64_t v_dim, bool variants);

// Times blocks of few KV heads, causal and with documents: 128 dimensions, from 2K to 16K rows.
void TimeHeads();

// The f32 kernels on a causal sequence.
void TimeF32(int64_t rows, int64_t heads, int64_t dim);

}  // namespace annulus::testing
