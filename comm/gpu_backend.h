#pragma once

// What the communicators for device tensors share: host tensors go by the host communicator; of the other
// calls, arguments are checked, and what needs no peer is done here.

#include <string>

#include "annulus/comm/gpu_communicator.h"

namespace annulus {

enum class GpuCall { kSend, kReceive, kAllReduce, kReduceScatter, kAllGather, kBroadcast };

struct GpuOperation {
  GpuCall call = GpuCall::kSend;
  ConstTensorRef in = {};  // undefined for kReceive
  TensorRef out = {};      // undefined for kSend; `in` itself for kAllReduce and kBroadcast
  ReduceOp op = ReduceOp::kSum;
  int peer = 0;  // of a message; the root of kBroadcast
  int tag = 0;
};
std::string ToString(const GpuOperation& operation);  // "all-gather f32 [4] -> [16]", "send f32 [4] to 1"

class GpuBackend : public CommBackend {
 public:
  GpuBackend(Communicator host, Context& ctx, std::string lane)
      : host_(std::move(host)), ctx_(ctx), lane_(std::move(lane)) {}

  int rank() const final { return host_.rank(); }
  int size() const final { return host_.size(); }
  absl::StatusOr<Request> Send(ConstTensorRef data, int peer, int tag) final;
  absl::StatusOr<Request> Receive(TensorRef data, int peer, int tag) final;
  absl::StatusOr<Request> AllReduce(TensorRef data, ReduceOp op) final;
  absl::StatusOr<Request> ReduceScatter(ConstTensorRef in, TensorRef out) final;
  absl::StatusOr<Request> AllGather(ConstTensorRef in, TensorRef out) final;
  absl::StatusOr<Request> Broadcast(TensorRef data, int root) final;
  std::shared_ptr<CommProgress> progress() const final { return host_.progress(); }
  absl::Status Health() override { return host_.Health(); }

 protected:
  // Starts an operation of several ranks on at least one element of the context's device.
  virtual absl::StatusOr<Request> Start(const GpuOperation& operation) = 0;
  // For a group split from this one with `color`.
  std::string LaneOf(int color) const { return absl::StrCat(lane_, ", part ", color); }

  Communicator host_;
  Context& ctx_;
  const std::string lane_;

 private:
  // Whether `tensor` is on the context's device; else it is on the host.
  bool IsOnDevice(const ConstTensorRef& tensor) const;
  void CheckOperation(const GpuOperation& operation) const;
  absl::StatusOr<Request> StartChecked(const GpuOperation& operation);
};

// Two ranks of the group that share a GPU, in words, or nothing if each has its own. Collective.
absl::StatusOr<std::string> DescribeSharedGpu(Communicator host, const Context& ctx);

}  // namespace annulus
