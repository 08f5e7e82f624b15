#pragma once

// Products of one warp that owns 16 kM rows of the left operand; the right operand is a tile in shared
// memory. Each fragment read from there feeds kM products, and shared memory delivers only 128 bytes a clock:
// with kM = 1 it limits a kernel, not the tensor cores.

#include "mma_primitives.cuh"

namespace annulus::kernels {

template <int kM, int kColumns>
using Fragments = float[kM][kColumns / 8][4];  // C fragments of [16 kM, kColumns]

template <int kM, int kN>
__device__ inline void Clear(float (&x)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      for (int c = 0; c < 4; ++c) x[m][n][c] = 0;
    }
  }
}

// to[16 kM, kRows] = A B^T; A [the rows at a_lane, kDepth], B [kRows, kDepth] at its crossed lane address.
template <typename A, typename B, int kM, int kRows, int kDepth>
__device__ void MultiplyTransposed(Fragments<kM, kRows>& to, uint32_t a_lane, uint32_t b_lane) {
  Clear(to);
#pragma unroll
  for (int d = 0; d < kDepth / 16; ++d) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) LoadMatrices(a[m], A::At(a_lane, m, d));
#pragma unroll
    for (int n = 0; n < kRows / 16; ++n) {
      uint32_t b[4];
      LoadMatrices(b, B::At(b_lane, n, d));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        MultiplyAdd(to[m][2 * n], a[m], b[0], b[1]);
        MultiplyAdd(to[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// to[16 kM, kColumns] += left B; left [16 kM, kDepth] is rounded, B [kDepth, kColumns].
template <typename B, int kM, int kColumns, int kDepth>
__device__ void AddProduct(Fragments<kM, kColumns>& to, const Fragments<kM, kDepth>& left, uint32_t b_lane) {
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) PackFragment(a[m], left[m][2 * k], left[m][2 * k + 1]);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t b[4];
      LoadMatricesTransposed(b, B::At(b_lane, k, n));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        MultiplyAdd(to[m][2 * n], a[m], b[0], b[1]);
        MultiplyAdd(to[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// How a thread block writes rows: it alone adds to them, others may too, or nothing is there yet.
enum class RowWrite { kAdd, kAtomicAdd, kSet };

// Rows [begin, end) of an f32 tensor, of a thread block each row for one warp.
struct GradientRows {
  float* data;  // row 0
  int64_t stride;
  int begin, end;
  RowWrite write = RowWrite::kAdd;
};

// to += factor from (or =), where `from` is rows row ... row + 16 kM - 1 of `to`.
template <int kM, int kN>
__device__ void WriteRows(const float (&from)[kM][kN][4], float factor, int row, const GradientRows& to) {
  constexpr int kAtOnce = 8;  // are read before the first is written: one wait for memory, not kAtOnce
  static_assert(kN % kAtOnce == 0);
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int begin = 0; begin < kN; begin += kAtOnce) {
      FragmentRow parts[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) parts[n] = GatherRow(from[m][begin + n], lane);
      const int at_row = row + m * 16 + parts[0].row;
      if (at_row < to.begin || at_row >= to.end) continue;
      float* at = to.data + at_row * to.stride + begin * 8 + parts[0].column;
      float4 before[kAtOnce] = {};
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (to.write == RowWrite::kAdd) before[n] = *reinterpret_cast<const float4*>(at + n * 8);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const FragmentRow& part = parts[n];
        if (to.write == RowWrite::kAtomicAdd) {
          AtomicAdd4(at + n * 8, factor * part.x, factor * part.y, factor * part.z, factor * part.w);
          continue;
        }
        *reinterpret_cast<float4*>(at + n * 8) = {
            fmaf(factor, part.x, before[n].x), fmaf(factor, part.y, before[n].y),
            fmaf(factor, part.z, before[n].z), fmaf(factor, part.w, before[n].w)};
      }
    }
  }
}

}  // namespace annulus::kernels
