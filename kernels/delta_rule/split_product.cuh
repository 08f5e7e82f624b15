#pragma once

// Products of f32 matrices in shared memory on tensor cores: an element is the sum of two tf32 numbers, 22
// bits of its 24, and a product of two elements is three products of those; the fourth is below what f32
// keeps.

#include <cstdint>

namespace annulus::kernels {

// x = high + low, to 2^-22 of x: integer arithmetic rounds to tf32's 10 bits, for the conversion takes many
// times as long; of `low` tensor cores drop what is beyond.
struct SplitFloat {
  uint32_t high, low;
};
__device__ inline SplitFloat Split(float x) {
  constexpr uint32_t kDropped = 13;
  const uint32_t high = (__float_as_uint(x) + (1u << (kDropped - 1))) & ~((1u << kDropped) - 1);
  return {high, __float_as_uint(x - __uint_as_float(high))};
}

// c += a b of 16 x 8 x 8.
__device__ inline void MultiplyTf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A matrix in shared memory whose element (i, l) is data[i * row + l * column].
struct SharedMatrix {
  const float* data;
  int row, column;
};

// What a lane holds of 16 x 16 of a product: fn(row, column, element).
struct ProductPart {
  float sum[2][4];
  __device__ void Add(float factor, const ProductPart& part) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[n][e] += factor * part.sum[n][e];
    }
  }
  template <typename Fn>
  __device__ void ForEach(const Fn& fn) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) fn(lane / 4 + e / 2 * 8, 8 * n + lane % 4 * 2 + e % 2, sum[n][e]);
    }
  }
};

// A warp's 16 x 16 of left right, at row `row` of the left and column `column` of the right.
//   depth: a multiple of 8
__device__ inline ProductPart WarpProduct(const SharedMatrix& left, const SharedMatrix& right, int row,
                                          int column, int depth) {
  const int lane = static_cast<int>(threadIdx.x % 32), group = lane / 4, place = lane % 4;
  const float* a = left.data + (row + group) * left.row + place * left.column;
  const float* b = right.data + place * right.row + (column + group) * right.column;
  float high[2][4] = {}, first[2][4] = {}, second[2][4] = {};  // apart: one would wait for the other
#pragma unroll 2
  for (int l = 0; l < depth; l += 8, a += 8 * left.column, b += 8 * right.row) {
    uint32_t a_high[4], a_low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const SplitFloat split = Split(a[i % 2 * 8 * left.row + i / 2 * 4 * left.column]);
      a_high[i] = split.high;
      a_low[i] = split.low;
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint32_t b_high[2], b_low[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const SplitFloat split = Split(b[i * 4 * right.row + n * 8 * right.column]);
        b_high[i] = split.high;
        b_low[i] = split.low;
      }
      MultiplyTf32(high[n], a_high, b_high);
      MultiplyTf32(first[n], a_high, b_low);
      MultiplyTf32(second[n], a_low, b_high);
    }
  }
  ProductPart part;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) part.sum[n][e] = high[n][e] + (first[n][e] + second[n][e]);
  }
  return part;
}

}  // namespace annulus::kernels
