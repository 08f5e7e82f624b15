#pragma once

// Block attention on the device in f64, by naive loops, one thread block a query row and head: fast enough to
// judge hundreds of calls of the op.

#include <array>

#include "cuda/attention_mma/device_arrays.h"

namespace annulus::testing {

// Dense results, doubles on the device: out [q_rows, batch, heads, v_dim], lse [q_rows, batch, heads], dq, dk
// and dv as q, k and v.
enum Result { kOut, kLse, kDq, kDk, kDv, kResults };
inline constexpr const char* kResultNames[] = {"O", "LSE", "dQ", "dK", "dV"};
struct ResultArrays {
  double* of[kResults] = {};
};

struct OpProblem {
  CudaHeads<const bf16> q, k, v, dout;
  int64_t q_rows = 0, k_rows = 0, batch = 0, heads = 0, kv_heads = 0, dim = 0, v_dim = 0;
  const int64_t *lo = nullptr, *hi = nullptr;  // [q_rows, batch], in key rows, within [0, k_rows]
  double scale = 1;
  bool keys_by_query_head = false;  // dk and dv of each query head apart, not summed over those of a KV head

  __host__ __device__ int64_t gradient_heads() const { return keys_by_query_head ? heads : kv_heads; }
  std::array<int64_t, kResults> sizes() const {
    const int64_t queries = q_rows * batch * heads, keys = k_rows * batch * gradient_heads();
    return {queries * v_dim, queries, queries * dim, keys * dim, keys * v_dim};
  }
};

void SolveExactly(const OpProblem& problem, const ResultArrays& results, cudaStream_t stream);
// Weights, their gradients and the output are rounded to bf16, by realization: of 0 as they are, of others at
// a multiple of the row's own. Kernels hold weights at such multiples, and where few elements or one key
// decide a result, the error of one realization says little of another's.
void SolveNaively(const OpProblem& problem, uint32_t realization, const ResultArrays& results,
                  cudaStream_t stream);

// [rows, heads, dim] summed over groups of `group` heads, each rounded to bf16 before.
void SumRoundedHeads(const double* of_heads, int64_t group, int64_t dim, double* sums, int64_t n,
                     cudaStream_t stream);

struct Deviation {
  double error = 0;    // largest, of elements that are finite
  unsigned wrong = 0;  // elements that are not as finite as the exact ones
};
// T: float, bf16, double. kBf16: rounded to that before.
enum class Stored { kAsIs, kBf16 };
template <typename T>
Deviation Compare(const T* got, Stored stored, const double* exact, int64_t n, cudaStream_t stream);

// Normal random numbers.
void FillNormal(bf16* x, int64_t n, double deviation, uint32_t seed, cudaStream_t stream);

// How many of n bytes differ, counted behind what was counted before.
void CountDifferentBytes(const void* x, const void* y, int64_t n, unsigned long long* count,
                         cudaStream_t stream);

// Reads the 16 bytes at `address`.
void Touch(const void* address, cudaStream_t stream);

}  // namespace annulus::testing
