// The only file that includes cudnn_frontend.h, which is slow to compile.
// The deterministic backward is never asked for: it needs a workspace of q_rows * k_rows per head.

#include "kernels/attention/cudnn_attention.h"

#include <cudnn_frontend.h>

#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

namespace annulus::kernels {
namespace {

namespace fe = cudnn_frontend;
using TensorPtr = std::shared_ptr<fe::graph::Tensor_attributes>;

enum Uid : int64_t { kQ = 1, kK, kV, kOut, kLse, kDout, kDq, kDk, kDv };

absl::Status Check(fe::error_t error, absl::string_view call) {
  if (error.is_good()) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(call, ": ", error.get_message()));
}
absl::Status Check(cudnnStatus_t status, absl::string_view call) {
  if (status == CUDNN_STATUS_SUCCESS) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(call, ": ", cudnnGetErrorString(status)));
}
#define ANNULUS_CUDNN(call) ANNULUS_RETURN_IF_ERROR(Check(call, #call))

struct Plan {
  fe::graph::Graph graph;
  int64_t workspace_bytes = 0;
};

// cuDNN counts [batch, heads, rows, dim].
struct Shape {
  int64_t batch, heads, rows, dim;
};
fe::graph::Tensor_attributes Describe(Uid uid, const Shape& shape, const CudnnStrides& strides) {
  return fe::graph::Tensor_attributes()
      .set_uid(uid)
      .set_dim({shape.batch, shape.heads, shape.rows, shape.dim})
      .set_stride({strides.batch, shape.dim, strides.row, 1})
      .set_data_type(fe::DataType_t::BFLOAT16);
}
void DescribeOutput(const TensorPtr& tensor, Uid uid, const Shape& shape, const CudnnStrides& strides) {
  tensor->set_output(true)
      .set_uid(uid)
      .set_dim({shape.batch, shape.heads, shape.rows, shape.dim})
      .set_stride({strides.batch, shape.dim, strides.row, 1})
      .set_data_type(fe::DataType_t::BFLOAT16);
}
// f32, packed [batch, heads, rows].
template <typename Tensor>
void DescribeLse(Tensor& tensor, const CudnnBlock& b) {
  tensor.set_uid(kLse)
      .set_dim({b.batch, b.heads, b.q_rows, 1})
      .set_stride({b.heads * b.q_rows, b.q_rows, 1, 1})
      .set_data_type(fe::DataType_t::FLOAT);
}

struct BlockShapes {
  explicit BlockShapes(const CudnnBlock& b)
      : q{b.batch, b.heads, b.q_rows, b.dim},
        k{b.batch, b.kv_heads, b.k_rows, b.dim},
        v{b.batch, b.kv_heads, b.k_rows, b.v_dim},
        out{b.batch, b.heads, b.q_rows, b.v_dim} {}
  Shape q, k, v, out;
};

template <typename Attributes>
void SetMask(const CudnnBlock& block, Attributes* attributes) {
  attributes->set_attn_scale(block.scale);
  if (block.mask == CudnnMask::kCausal) {
    attributes->set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT).set_diagonal_band_right_bound(0);
  }
}

void DescribeForward(const CudnnBlock& block, fe::graph::Graph* graph) {
  const BlockShapes shape(block);
  auto attributes = fe::graph::SDPA_attributes().set_name("attention_forward").set_generate_stats(true);
  SetMask(block, &attributes);
  auto [out, lse] = graph->sdpa(graph->tensor(Describe(kQ, shape.q, block.q)),
                                graph->tensor(Describe(kK, shape.k, block.k)),
                                graph->tensor(Describe(kV, shape.v, block.v)), attributes);
  DescribeOutput(out, kOut, shape.out, block.out);
  lse->set_output(true);
  DescribeLse(*lse, block);
}

void DescribeBackward(const CudnnBlock& block, fe::graph::Graph* graph) {
  const BlockShapes shape(block);
  auto attributes = fe::graph::SDPA_backward_attributes().set_name("attention_backward");
  SetMask(block, &attributes);
  fe::graph::Tensor_attributes lse;
  DescribeLse(lse, block);
  auto [dq, dk, dv] = graph->sdpa_backward(
      graph->tensor(Describe(kQ, shape.q, block.q)), graph->tensor(Describe(kK, shape.k, block.k)),
      graph->tensor(Describe(kV, shape.v, block.v)), graph->tensor(Describe(kOut, shape.out, block.out)),
      graph->tensor(Describe(kDout, shape.out, block.dout)), graph->tensor(lse), attributes);
  DescribeOutput(dq, kDq, shape.q, block.dq);
  DescribeOutput(dk, kDk, shape.k, block.dk);
  DescribeOutput(dv, kDv, shape.v, block.dv);
}

absl::Status Finish(cudnnHandle_t handle, Plan* plan) {
  fe::graph::Graph& graph = plan->graph;
  ANNULUS_CUDNN(graph.validate());
  ANNULUS_CUDNN(graph.build_operation_graph(handle));
  ANNULUS_CUDNN(graph.create_execution_plans({fe::HeurMode_t::A}));
  ANNULUS_CUDNN(graph.check_support(handle));
  ANNULUS_CUDNN(graph.build_plans(handle, fe::BuildPlanPolicy_t::HEURISTICS_CHOICE));
  ANNULUS_CUDNN(graph.get_workspace_size(plan->workspace_bytes));
  return absl::OkStatus();
}

std::string Describe(const CudnnBlock& b) {
  return absl::StrCat("block of ", b.q_rows, " queries, ", b.k_rows, " keys, ", b.heads, "/", b.kv_heads,
                      " heads of ", b.dim, "/", b.v_dim, b.mask == CudnnMask::kCausal ? ", causal: " : ": ");
}

void* Mutable(const void* p) { return const_cast<void*>(p); }

}  // namespace

struct CudnnAttention::State {
  cudnnHandle_t handle = nullptr;
  std::map<CudnnBlock, std::unique_ptr<Plan>> forward, backward;

  absl::StatusOr<Plan*> Find(const CudnnBlock& block, bool is_forward) {
    std::unique_ptr<Plan>& kept = (is_forward ? forward : backward)[block];
    if (kept != nullptr) return kept.get();
    auto plan = std::make_unique<Plan>();
    plan->graph.set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    is_forward ? DescribeForward(block, &plan->graph) : DescribeBackward(block, &plan->graph);
    ANNULUS_RETURN_IF_ERROR(Prefixed(Finish(handle, plan.get()), Describe(block)));
    kept = std::move(plan);
    return kept.get();
  }

  absl::Status Run(Plan* plan, std::unordered_map<int64_t, void*> pointers, const CudnnCall& call) {
    if (call.workspace_bytes < plan->workspace_bytes) {
      return Invalid("attention.workspace_bytes=", call.workspace_bytes, ": expected at least ",
                     plan->workspace_bytes);
    }
    ANNULUS_CUDNN(cudnnSetStream(handle, call.stream));
    ANNULUS_CUDNN(plan->graph.execute(handle, pointers, call.workspace));
    return absl::OkStatus();
  }
};

CudnnAttention::CudnnAttention(std::unique_ptr<State> state) : state_(std::move(state)) {}
CudnnAttention::~CudnnAttention() { cudnnDestroy(state_->handle); }

absl::StatusOr<std::unique_ptr<CudnnAttention>> CudnnAttention::Create() {
  auto state = std::make_unique<State>();
  ANNULUS_CUDNN(cudnnCreate(&state->handle));
  return std::unique_ptr<CudnnAttention>(new CudnnAttention(std::move(state)));
}

absl::StatusOr<int64_t> CudnnAttention::ForwardWorkspaceBytes(const CudnnBlock& block) {
  ANNULUS_ASSIGN_OR_RETURN(Plan * plan, state_->Find(block, true));
  return plan->workspace_bytes;
}
absl::StatusOr<int64_t> CudnnAttention::BackwardWorkspaceBytes(const CudnnBlock& block) {
  ANNULUS_ASSIGN_OR_RETURN(Plan * plan, state_->Find(block, false));
  return plan->workspace_bytes;
}

absl::Status CudnnAttention::Forward(const CudnnBlock& block, const CudnnForwardPointers& p,
                                     const CudnnCall& call) {
  ANNULUS_ASSIGN_OR_RETURN(Plan * plan, state_->Find(block, true));
  return state_->Run(
      plan, {{kQ, Mutable(p.q)}, {kK, Mutable(p.k)}, {kV, Mutable(p.v)}, {kOut, p.out}, {kLse, p.lse}}, call);
}

absl::Status CudnnAttention::Backward(const CudnnBlock& block, const CudnnBackwardPointers& p,
                                      const CudnnCall& call) {
  ANNULUS_ASSIGN_OR_RETURN(Plan * plan, state_->Find(block, false));
  return state_->Run(plan,
                     {{kQ, Mutable(p.q)},
                      {kK, Mutable(p.k)},
                      {kV, Mutable(p.v)},
                      {kOut, Mutable(p.out)},
                      {kDout, Mutable(p.dout)},
                      {kLse, const_cast<float*>(p.lse)},
                      {kDq, p.dq},
                      {kDk, p.dk},
                      {kDv, p.dv}},
                     call);
}

}  // namespace annulus::kernels
