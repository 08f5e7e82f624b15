#include "gpu_backend.h"

#include "annulus/device/gpu.h"
#include "annulus/device/transfer.h"

namespace annulus {

std::string ToString(const GpuOperation& operation) {
  const auto text = [](const ConstTensorRef& tensor) {
    return absl::StrCat(Name(tensor.dtype()), " ", ToString(tensor.shape()));
  };
  switch (operation.call) {
    case GpuCall::kSend:
      return absl::StrCat("send ", text(operation.in), " to ", operation.peer);
    case GpuCall::kReceive:
      return absl::StrCat("receive ", text(operation.out), " from ", operation.peer);
    case GpuCall::kAllReduce:
      return absl::StrCat("all-reduce ", text(operation.in));
    case GpuCall::kReduceScatter:
      return absl::StrCat("reduce-scatter ", text(operation.in), " -> ", ToString(operation.out.shape()));
    case GpuCall::kAllGather:
      return absl::StrCat("all-gather ", text(operation.in), " -> ", ToString(operation.out.shape()));
    case GpuCall::kBroadcast:
      return absl::StrCat("broadcast ", text(operation.in), " from ", operation.peer);
  }
  return "";
}

absl::StatusOr<Request> GpuBackend::Send(ConstTensorRef data, int peer, int tag) {
  if (!IsOnDevice(data)) return host_.Send(data, peer, tag);
  return StartChecked({.call = GpuCall::kSend, .in = data, .peer = peer, .tag = tag});
}

absl::StatusOr<Request> GpuBackend::Receive(TensorRef data, int peer, int tag) {
  if (!IsOnDevice(data)) return host_.Receive(data, peer, tag);
  return StartChecked({.call = GpuCall::kReceive, .out = data, .peer = peer, .tag = tag});
}

absl::StatusOr<Request> GpuBackend::AllReduce(TensorRef data, ReduceOp op) {
  if (!IsOnDevice(data)) return host_.IAllReduce(data, op);
  return StartChecked({.call = GpuCall::kAllReduce, .in = data, .out = data, .op = op});
}

absl::StatusOr<Request> GpuBackend::ReduceScatter(ConstTensorRef in, TensorRef out) {
  if (!IsOnDevice(in) && !IsOnDevice(out)) return host_.IReduceScatter(in, out);
  return StartChecked({.call = GpuCall::kReduceScatter, .in = in, .out = out});
}

absl::StatusOr<Request> GpuBackend::AllGather(ConstTensorRef in, TensorRef out) {
  if (!IsOnDevice(in) && !IsOnDevice(out)) return host_.IAllGather(in, out);
  return StartChecked({.call = GpuCall::kAllGather, .in = in, .out = out});
}

absl::StatusOr<Request> GpuBackend::Broadcast(TensorRef data, int root) {
  if (!IsOnDevice(data)) return host_.IBroadcast(data, root);
  return StartChecked({.call = GpuCall::kBroadcast, .in = data, .out = data, .peer = root});
}

bool GpuBackend::IsOnDevice(const ConstTensorRef& tensor) const {
  if (tensor.device() == ctx_.device) return true;
  ANNULUS_CHECK(tensor.device().kind == DeviceKind::kCpu)
      << "a tensor on " << ToString(tensor.device()) << " for a communicator of " << ToString(ctx_.device);
  return false;
}

void GpuBackend::CheckOperation(const GpuOperation& operation) const {
  const ConstTensorRef& in = operation.in;
  const TensorRef& out = operation.out;
  int64_t in_parts = 1, out_parts = 1;
  switch (operation.call) {
    case GpuCall::kSend:
    case GpuCall::kReceive:
      ANNULUS_CHECK(0 <= operation.peer && operation.peer < size() && operation.peer != rank())
          << ToString(operation) << " by rank " << rank() << " of " << size();
      ANNULUS_CHECK(0 <= operation.tag && operation.tag < Communicator::kMaxTag) << "tag " << operation.tag;
      return;
    case GpuCall::kBroadcast:
      ANNULUS_CHECK(0 <= operation.peer && operation.peer < size()) << ToString(operation);
      return;
    case GpuCall::kAllReduce:
      return;
    case GpuCall::kReduceScatter:
      in_parts = size();
      break;
    case GpuCall::kAllGather:
      out_parts = size();
      break;
  }
  ANNULUS_CHECK(in.device() == ctx_.device && out.device() == ctx_.device)
      << ToString(operation) << " from " << ToString(in.device()) << " to " << ToString(out.device());
  ANNULUS_CHECK(in.dtype() == out.dtype() && in.elements() * out_parts == out.elements() * in_parts)
      << ToString(operation) << " of " << size() << " ranks";
}

absl::StatusOr<Request> GpuBackend::StartChecked(const GpuOperation& operation) {
  CheckOperation(operation);
  const int64_t elements =
      operation.call == GpuCall::kReceive ? operation.out.elements() : operation.in.elements();
  if (elements == 0) return Request();
  if (size() > 1) return Start(operation);
  if (operation.in.raw() != operation.out.raw()) CopyBytes(operation.in, operation.out, ctx_.stream());
  return Request();
}

absl::StatusOr<std::string> DescribeSharedGpu(Communicator host, const Context& ctx) {
  absl::StatusOr<GpuInfo> gpu = Invalid("device=", ToString(ctx.device), ": expected a GPU");
  if (ctx.device.kind == DeviceKind::kCuda) gpu = DescribeGpu(ctx.device.index);
  ANNULUS_RETURN_IF_ERROR(host.AgreeOk(gpu.status()));
  ANNULUS_ASSIGN_OR_RETURN(const std::vector<std::string> owners, host.AllGatherStrings(gpu->identity));
  for (size_t a = 0; a < owners.size(); ++a) {
    for (size_t b = a + 1; b < owners.size(); ++b) {
      if (owners[a] == owners[b]) return absl::StrCat("ranks ", a, " and ", b, " share GPU ", owners[a]);
    }
  }
  return "";
}

}  // namespace annulus
