#pragma once

// Products of warpgroups (kernels/common/wgmma.cuh) and stores and loads of matrices, emulated: descriptors
// and fragments are decoded as the PTX ISA defines them (wgmma.mma_async, sections on matrix fragments and on
// shared memory matrix layouts).
//
// A product reads shared memory at a random time between its start and the wait for its group. Until that
// wait the accumulators hold NaN, so that who reads them too early sees it; what is written to them is lost.

#include <cstdint>

namespace annulus::emulation {

// c (=, +=) a b for 16 of k and 8 `blocks` columns.
struct ProductStart {
  int blocks = 0, keep = 0;
  uint64_t a = 0, b = 0;  // descriptors
  const uint32_t* a_fragment = nullptr;
  int a_major = 0, b_major = 0;  // 0: k along the rows of shared memory
  float* c = nullptr;            // [blocks][4]
};
void StartProduct(const ProductStart& start);
void CommitProducts();
void WaitProducts(int pending);

}  // namespace annulus::emulation

namespace annulus::kernels {

inline void GroupFence() {}
inline void GroupCommit() { emulation::CommitProducts(); }
template <int kPending>
void GroupWait() {
  emulation::WaitProducts(kPending);
}
template <int kN>
void GroupUse(float (&)[kN][4]) {}

template <auto kLeft, auto kRight, int kN>
void MultiplyShared(float (&c)[kN][4], uint64_t a, uint64_t b, int keep) {
  emulation::StartProduct({.blocks = kN,
                           .keep = keep,
                           .a = a,
                           .b = b,
                           .a_major = static_cast<int>(kLeft),
                           .b_major = static_cast<int>(kRight),
                           .c = c[0]});
}
template <auto kRight, int kN>
void MultiplyRegisters(float (&c)[kN][4], const uint32_t (&a)[4], uint64_t b, int keep) {
  emulation::StartProduct(
      {.blocks = kN, .keep = keep, .b = b, .a_fragment = a, .b_major = static_cast<int>(kRight), .c = c[0]});
}

void LoadMatrices(uint32_t (&r)[4], uint32_t address);
void MultiplyAdd(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void LoadMatricesTransposed(uint32_t (&r)[4], uint32_t address);
void StoreMatrices(uint32_t address, const uint32_t (&r)[4]);
void StoreMatricesTransposed(uint32_t address, const uint32_t (&r)[4]);

}  // namespace annulus::kernels
