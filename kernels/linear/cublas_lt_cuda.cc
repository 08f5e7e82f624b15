// cuBLASLt is column-major: c = a b in rows is c^T = b^T a^T in columns, the same memory with a and b
// exchanged.

#include <algorithm>
#include <initializer_list>

#include "kernels/linear/cublas_lt.h"

namespace annulus::kernels {
namespace {

absl::Status Check(cublasStatus_t status, absl::string_view call) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(call, ": ", cublasLtGetStatusString(status)));
}

#define ANNULUS_CUBLAS(call) ANNULUS_RETURN_IF_ERROR(Check(call, #call))

cudaDataType_t TypeOf(CudaElement element) { return element == CudaElement::kF32 ? CUDA_R_32F : CUDA_R_16BF; }

// The largest power of two, up to 256, that divides the address and the bytes between rows.
uint32_t AlignmentOf(const void* data, int64_t stride, CudaElement element) {
  const uint64_t bits =
      reinterpret_cast<uint64_t>(data) | static_cast<uint64_t>(stride * SizeOf(element)) | uint64_t{256};
  return static_cast<uint32_t>(bits & (~bits + 1));
}

// A row-major matrix of `rows` rows of `cols` elements, as columns.
cublasStatus_t InitLayout(cublasLtMatrixLayoutOpaque_t* layout, CudaElement element, int64_t rows,
                          int64_t cols, int64_t stride) {
  return cublasLtMatrixLayoutInit(layout, TypeOf(element), static_cast<uint64_t>(cols),
                                  static_cast<uint64_t>(rows), stride);
}

template <typename T>
cublasStatus_t Set(cublasLtMatmulDescOpaque_t* operation, cublasLtMatmulDescAttributes_t attribute, T value) {
  return cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof(value));
}
template <typename T>
cublasStatus_t Set(cublasLtMatmulPreferenceOpaque_t* preference,
                   cublasLtMatmulPreferenceAttributes_t attribute, T value) {
  return cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value));
}

}  // namespace

absl::StatusOr<std::unique_ptr<CublasLt>> CublasLt::Create(int sm_count) {
  cublasLtHandle_t handle = nullptr;
  ANNULUS_CUBLAS(cublasLtCreate(&handle));
  return std::unique_ptr<CublasLt>(new CublasLt(handle, sm_count));
}

CublasLt::~CublasLt() { cublasLtDestroy(handle_); }

size_t CublasLt::KeyHash::operator()(const Key& key) const {
  const auto word_of = [](auto value) { return static_cast<uint64_t>(value); };
  uint64_t hash = 14695981039346656037u;  // FNV-1a over words
  for (const uint64_t word :
       {word_of(key.m), word_of(key.n), word_of(key.k), word_of(key.a_stride), word_of(key.b_stride),
        word_of(key.c_stride), word_of(key.workspace_bytes), word_of(key.a_alignment),
        word_of(key.b_alignment), word_of(key.c_alignment), word_of(key.operands), word_of(key.result),
        word_of(key.a_layout), word_of(key.b_layout), word_of(key.accumulate)}) {
    hash = (hash ^ word) * 1099511628211u;
    hash ^= hash >> 29;
  }
  return hash;
}

CublasLt::Key CublasLt::KeyOf(const Product& p, int64_t workspace_bytes) {
  return {.m = p.m,
          .n = p.n,
          .k = p.k,
          .a_stride = p.a.stride,
          .b_stride = p.b.stride,
          .c_stride = p.c_stride,
          .workspace_bytes = workspace_bytes,
          .a_alignment = AlignmentOf(p.a.data, p.a.stride, p.operands),
          .b_alignment = AlignmentOf(p.b.data, p.b.stride, p.operands),
          .c_alignment = AlignmentOf(p.c, p.c_stride, p.result),
          .operands = p.operands,
          .result = p.result,
          .a_layout = p.a_layout,
          .b_layout = p.b_layout,
          .accumulate = p.accumulate};
}

absl::Status CublasLt::MakePlan(const Key& key, Plan* plan) const {
  const auto transpose = [](Layout layout) {
    return layout == Layout::kTransposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  };
  const bool a_stored = key.a_layout == Layout::kAsStored, b_stored = key.b_layout == Layout::kAsStored;
  ANNULUS_CUBLAS(cublasLtMatmulDescInit(&plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  ANNULUS_CUBLAS(Set(&plan->operation, CUBLASLT_MATMUL_DESC_TRANSA, transpose(key.b_layout)));
  ANNULUS_CUBLAS(Set(&plan->operation, CUBLASLT_MATMUL_DESC_TRANSB, transpose(key.a_layout)));
  if (sm_count_ > 0) {
    ANNULUS_CUBLAS(Set(&plan->operation, CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, int32_t{sm_count_}));
  }
  ANNULUS_CUBLAS(
      InitLayout(&plan->a, key.operands, a_stored ? key.m : key.k, a_stored ? key.k : key.m, key.a_stride));
  ANNULUS_CUBLAS(
      InitLayout(&plan->b, key.operands, b_stored ? key.k : key.n, b_stored ? key.n : key.k, key.b_stride));
  ANNULUS_CUBLAS(InitLayout(&plan->c, key.result, key.m, key.n, key.c_stride));

  cublasLtMatmulPreferenceOpaque_t preference;
  ANNULUS_CUBLAS(cublasLtMatmulPreferenceInit(&preference));
  ANNULUS_CUBLAS(
      Set(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(key.workspace_bytes)));
  ANNULUS_CUBLAS(Set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.b_alignment));
  ANNULUS_CUBLAS(Set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.a_alignment));
  ANNULUS_CUBLAS(Set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.c_alignment));
  ANNULUS_CUBLAS(Set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.c_alignment));
  cublasLtMatmulHeuristicResult_t best = {};
  int found = 0;
  ANNULUS_CUBLAS(cublasLtMatmulAlgoGetHeuristic(handle_, &plan->operation, &plan->b, &plan->a, &plan->c,
                                                &plan->c, &preference, 1, &best, &found));
  if (found == 0) {
    return Invalid("cublasLtMatmulAlgoGetHeuristic: no algorithm for m=", key.m, ", n=", key.n, ", k=", key.k,
                   ", strides ", key.a_stride, ", ", key.b_stride, ", ", key.c_stride);
  }
  plan->algorithm = best.algo;
  return absl::OkStatus();
}

absl::StatusOr<CublasLt::Plan*> CublasLt::FindPlan(const Key& key) {
  std::unique_ptr<Plan>& plan = plans_[key];
  if (plan == nullptr) {
    auto made = std::make_unique<Plan>();
    ANNULUS_RETURN_IF_ERROR(MakePlan(key, made.get()));
    plan = std::move(made);
  }
  return plan.get();
}

absl::Status CublasLt::Multiply(const Product& product, CudaWorkspace workspace, cudaStream_t stream) {
  if (product.m == 0 || product.n == 0) return absl::OkStatus();
  if (product.k == 0) {  // the library takes no empty sum
    if (product.accumulate) return absl::OkStatus();
    const auto width = static_cast<size_t>(SizeOf(product.result));
    const cudaError_t error =
        cudaMemset2DAsync(product.c, static_cast<size_t>(product.c_stride) * width, 0,
                          static_cast<size_t>(product.n) * width, static_cast<size_t>(product.m), stream);
    return error == cudaSuccess ? absl::OkStatus() : absl::InternalError(cudaGetErrorString(error));
  }
  ANNULUS_ASSIGN_OR_RETURN(Plan * plan, FindPlan(KeyOf(product, workspace.bytes)));
  const float alpha = 1, beta = product.accumulate ? 1 : 0;
  ANNULUS_CUBLAS(cublasLtMatmul(handle_, &plan->operation, &alpha, product.b.data, &plan->b, product.a.data,
                                &plan->a, &beta, product.c, &plan->c, product.c, &plan->c, &plan->algorithm,
                                workspace.data, static_cast<size_t>(workspace.bytes), stream));
  return absl::OkStatus();
}

}  // namespace annulus::kernels
