#pragma once

// Attention of one block of queries on one block of keys through cuDNN: full and causal blocks in bf16. A
// block of a ring needs nothing more in backward than in one call: with the LSE and O of all blocks together,
// each block's dQ, dK, dV are its own summands.
//
// Measured on H100 with 9.19, heads of 128 at 8K to 32K: forward 650-690, backward 530-575 TFLOP/s. The
// backward of full 192/128 blocks runs at half the rate of causal ones (280 to 520); the library offers no
// other plan.
//
// Results come out in 16 bits; a ring merges them in f32 (attention_merge_cuda.h). Plans are made once per
// shape, which takes the library up to a second, and kept.

#include <cuda_runtime.h>

#include <compare>
#include <cstdint>
#include <memory>

#include "annulus/base/status.h"

namespace annulus::kernels {

// Strides of [rows, batch, heads, dim] in elements; heads and dim are contiguous.
struct CudnnStrides {
  int64_t row = 0, batch = 0;
  auto operator<=>(const CudnnStrides&) const = default;
};

// kCausal: query row i sees key rows 0..i. Blocks off a ring's diagonal are full or not computed at all.
enum class CudnnMask : uint8_t { kFull, kCausal };

struct CudnnBlock {
  int64_t batch = 1, heads = 0, kv_heads = 0, q_rows = 0, k_rows = 0;
  int64_t dim = 0, v_dim = 0;  // 64, 128, or 192 with v_dim 128
  CudnnMask mask = CudnnMask::kFull;
  float scale = 1;
  CudnnStrides q, k, v, out;
  CudnnStrides dout, dq, dk, dv;  // backward only
  auto operator<=>(const CudnnBlock&) const = default;
};

struct CudnnForwardPointers {
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  void* out = nullptr;   // bf16
  float* lse = nullptr;  // [batch, heads, q_rows], natural logarithm
};
struct CudnnBackwardPointers {
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  const void *out = nullptr, *dout = nullptr;
  const float* lse = nullptr;  // [batch, heads, q_rows], packed: the library reads no other order before 9.26
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;  // bf16, overwritten
};
struct CudnnCall {
  void* workspace = nullptr;  // on 256 bytes
  int64_t workspace_bytes = 0;
  cudaStream_t stream = nullptr;
};

class CudnnAttention {
 public:
  static absl::StatusOr<std::unique_ptr<CudnnAttention>> Create();  // on the current device
  ~CudnnAttention();
  CudnnAttention(const CudnnAttention&) = delete;
  CudnnAttention& operator=(const CudnnAttention&) = delete;

  // Bytes of workspace; makes the plan, so asking before the first step keeps that step short. With fewer KV
  // heads than heads the backward holds dK and dV of every head.
  absl::StatusOr<int64_t> ForwardWorkspaceBytes(const CudnnBlock& block);
  absl::StatusOr<int64_t> BackwardWorkspaceBytes(const CudnnBlock& block);

  // One thread at a time.
  absl::Status Forward(const CudnnBlock& block, const CudnnForwardPointers& pointers, const CudnnCall& call);
  absl::Status Backward(const CudnnBlock& block, const CudnnBackwardPointers& pointers,
                        const CudnnCall& call);

 private:
  struct State;
  explicit CudnnAttention(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace annulus::kernels
