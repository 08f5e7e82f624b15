#pragma once

// Matrix products through cuBLASLt on row-major matrices with leading dimensions. bf16 operands are
// multiplied with f32 accumulation, f32 operands in f32 (no tf32). The library's choice of algorithm is asked
// for once per shape, layout and alignment, and kept.

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <unordered_map>

#include "annulus/base/status.h"

namespace annulus::kernels {

enum class CudaElement : uint8_t { kF32, kBf16 };
inline int64_t SizeOf(CudaElement element) { return element == CudaElement::kF32 ? 4 : 2; }

// Row i starts at element i * stride.
struct CudaMatrix {
  const void* data = nullptr;
  int64_t stride = 0;
};
enum class Layout : uint8_t { kAsStored, kTransposed };

// Bytes of workspace with which Hopper's split-k algorithms are open (the library's own recommendation).
inline constexpr int64_t kCublasLtWorkspaceBytes = int64_t{32} << 20;

struct CudaWorkspace {
  void* data = nullptr;  // on 256 bytes
  int64_t bytes = 0;
};

class CublasLt {
 public:
  // c[m, n] (=, +=) op(a)[m, k] op(b)[k, n]. Into a bf16 c the library rounds the product before it adds
  // (seen in 13.1): what must not round twice accumulates in f32.
  struct Product {
    int64_t m = 0, n = 0, k = 0;
    CudaElement operands = CudaElement::kBf16, result = CudaElement::kBf16;
    CudaMatrix a, b;
    Layout a_layout = Layout::kAsStored, b_layout = Layout::kAsStored;
    bool accumulate = false;
    void* c = nullptr;
    int64_t c_stride = 0;
  };

  // sm_count: SMs that products may fill, 0 for all of them. Fewer leave room for communication kernels.
  static absl::StatusOr<std::unique_ptr<CublasLt>> Create(int sm_count = 0);
  ~CublasLt();
  CublasLt(const CublasLt&) = delete;
  CublasLt& operator=(const CublasLt&) = delete;

  // One thread at a time. The workspace is in use until the product has run.
  absl::Status Multiply(const Product& product, CudaWorkspace workspace, cudaStream_t stream);

 private:
  struct Key {
    int64_t m, n, k, a_stride, b_stride, c_stride, workspace_bytes;
    uint32_t a_alignment, b_alignment, c_alignment;
    CudaElement operands, result;
    Layout a_layout, b_layout;
    bool accumulate;
    bool operator==(const Key&) const = default;
  };
  struct KeyHash {
    size_t operator()(const Key& key) const;
  };
  struct Plan {
    cublasLtMatmulDescOpaque_t operation;
    cublasLtMatrixLayoutOpaque_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
  };

  CublasLt(cublasLtHandle_t handle, int sm_count) : handle_(handle), sm_count_(sm_count) {}
  static Key KeyOf(const Product& product, int64_t workspace_bytes);
  absl::StatusOr<Plan*> FindPlan(const Key& key);
  absl::Status MakePlan(const Key& key, Plan* plan) const;

  cublasLtHandle_t handle_;
  int sm_count_;
  std::unordered_map<Key, std::unique_ptr<Plan>, KeyHash> plans_;
};

}  // namespace annulus::kernels
