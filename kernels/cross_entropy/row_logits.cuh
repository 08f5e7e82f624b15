#pragma once

// The logits of a row as a CTA sees them, for the kernels of cross_entropy_cuda.cu. From sm_90 a row is kept
// on chip by a cluster of CTAs; before, where there are no clusters, one CTA reads it from global memory each
// time, which is right for every vocabulary, and slower.

#include <cooperative_groups.h>

#include "kernels/common/async_copy.cuh"
#include "kernels/common/vector.cuh"

namespace annulus::kernels {

constexpr int kThreads = 512;
constexpr int kWidth = 4;  // logits of a vector
constexpr int kVectorBytes = kWidth * static_cast<int>(sizeof(float));
constexpr int kHeld = 4;  // vectors of a row that a thread holds in registers

using Logits = Pack<float, kWidth>;

class RowEnd {
 public:
  __device__ explicit RowEnd(int64_t vocab) : whole_(static_cast<int>(vocab / kWidth)) {}
  // -inf past the vocabulary: the last vector of a row may reach there, where the row's stride covers it.
  __device__ Logits Inside(int vector, int64_t vocab, Logits pack) const {
    if (vector >= whole_) {
      const auto inside = static_cast<int>(vocab - int64_t{vector} * kWidth);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) pack.value[i] = i < inside ? pack.value[i] : -INFINITY;
    }
    return pack;
  }

 private:
  const int whole_;  // vectors
};

// Vectors of a CTA, whole lines of memory.
__host__ __device__ inline int ShareOf(int64_t vocab, int ranks) {
  constexpr int kLine = 128 / kVectorBytes;
  return static_cast<int>((vocab + int64_t{kWidth} * kLine * ranks - 1) / (int64_t{kWidth} * kLine * ranks)) *
         kLine;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ inline cooperative_groups::cluster_group ThisCluster() {
  return cooperative_groups::this_cluster();
}

// A CTA's slice of a row on chip, of the next row where this one is done with: vectors [begin, end), the
// first kVectors of each thread in its registers, the others in shared memory. A thread reads only what it
// asked for itself, so that it may ask for the next row's vector as soon as it has used this one's.
template <int kVectors>
class Kept : public RowEnd {
 public:
  __device__ Kept(void* shared, int64_t vocab, int rank, int ranks)
      : RowEnd(vocab), shared_(static_cast<Logits*>(shared)) {
    const int vectors = static_cast<int>((vocab + kWidth - 1) / kWidth), share = ShareOf(vocab, ranks);
    begin_ = min(rank * share, vectors);
    end_ = min(begin_ + share, vectors);
  }
  // The slice of a row, while nothing is kept.
  __device__ void Ask(const float* row) {
    ForEach([](int, const Logits&) {}, row, [] {});
  }
  // Calls use(vector, logits) for this thread's share, in the order in which it was asked for, and asks for
  // the same of `next`, unless that is null. Shared memory goes in two halves, each a group of copies with
  // wait() before it: one is under way while the other is worked on.
  template <typename Use, typename Wait>
  __device__ void ForEach(const Use& use, const float* next, const Wait& wait) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = begin_ + i * kThreads + static_cast<int>(threadIdx.x);
      if (vector >= end_) break;
      use(vector, held_[i]);
      if (next != nullptr) held_[i] = LoadPack<kWidth>(next + int64_t{vector} * kWidth);
    }
    const int first = min(begin_ + kVectors * kThreads, end_);
    const int passes = (end_ - first + kThreads - 1) / kThreads, middle = first + passes / 2 * kThreads;
    const auto half = [&](int from, int to) {
      wait();
#pragma unroll 4
      for (int vector = from + static_cast<int>(threadIdx.x); vector < to; vector += kThreads) {
        Logits& kept = shared_[vector - first];
        use(vector, kept);
        if (next != nullptr) CopyAsync16(SharedAddress(&kept), next + int64_t{vector} * kWidth);
      }
      CopyAsyncCommit();
    };
    half(first, middle);
    half(middle, end_);
  }

 private:
  Logits* const shared_;
  Logits held_[kVectors > 0 ? kVectors : 1];
  int begin_, end_;  // vectors
};

#else

// A CTA alone, as a cluster.
struct OneCta {
  __device__ static int block_rank() { return 0; }
  __device__ static int num_blocks() { return 1; }
  __device__ static void sync() { __syncthreads(); }
  template <typename T>
  __device__ static T* map_shared_rank(T* shared, int) {
    return shared;
  }
};
__device__ inline OneCta ThisCluster() { return {}; }

// A row in global memory, read again by each pass; called as the other one is.
template <int>
class Kept : public RowEnd {
 public:
  __device__ Kept(void*, int64_t vocab, int, int)
      : RowEnd(vocab), vectors_(static_cast<int>((vocab + kWidth - 1) / kWidth)) {}
  __device__ void Ask(const float* row) { row_ = row; }
  // As many vectors at a time as a thread holds: once all threads have read theirs, a gradient as wide or
  // narrower may take the place of these and of those before.
  template <typename Use, typename Wait>
  __device__ void ForEach(const Use& use, const float* next, const Wait&) {
    for (int begin = 0; begin < vectors_; begin += kHeld * kThreads) {
      const int first = begin + static_cast<int>(threadIdx.x);
      Logits held[kHeld];
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int vector = first + i * kThreads;
        if (vector < vectors_) held[i] = LoadPack<kWidth>(row_ + int64_t{vector} * kWidth);
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int vector = first + i * kThreads;
        if (vector < vectors_) use(vector, held[i]);
      }
    }
    if (next != nullptr) row_ = next;
  }

 private:
  const float* row_ = nullptr;
  const int vectors_;
};

#endif

}  // namespace annulus::kernels
