#pragma once

// A communicator for device tensors under the checks that were written for host tensors: host tensors are
// copied to the device, travel there and are copied back.

#include <memory>
#include <utility>
#include <vector>

#include "annulus/device/transfer.h"
#include "comm/communicator_checks.h"

namespace annulus::testing {

// An operation on copies of host tensors.
class DeviceRequest : public RequestState {
 public:
  explicit DeviceRequest(Context& ctx) : ctx_(ctx) {}

  TensorRef Copy(ConstTensorRef host) {
    copies_.emplace_back(ctx_.device, host.dtype(), host.shape());
    Upload(ctx_, host.raw(), host.bytes(), copies_.back().ref());
    return copies_.back().ref();
  }
  // A copy that comes back to `host` when the operation is complete.
  TensorRef CopyOfResult(TensorRef host) {
    const TensorRef copy = Copy(host);
    results_.emplace_back(copy, host);
    return copy;
  }
  static absl::StatusOr<Request> Started(std::unique_ptr<DeviceRequest> state,
                                         absl::StatusOr<Request> request) {
    ANNULUS_RETURN_IF_ERROR(request.status());
    state->request_ = *std::move(request);
    return Request(std::move(state));
  }

  absl::StatusOr<bool> Test() override {
    ANNULUS_ASSIGN_OR_RETURN(const bool complete, request_.Test());
    if (complete) CopyBack();
    return complete;
  }
  absl::Status Wait() override {
    ANNULUS_RETURN_IF_ERROR(request_.Wait());
    CopyBack();
    return absl::OkStatus();
  }

 private:
  void CopyBack() {
    for (const auto& [copy, host] : results_) {
      if (host.bytes() > 0) Download(ctx_, copy, host.raw());
    }
  }
  Context& ctx_;
  std::vector<Tensor> copies_;
  std::vector<std::pair<TensorRef, TensorRef>> results_;
  Request request_;
};

class ThroughDevice : public CommBackend {
 public:
  // `device` is WithGpu of `host`.
  ThroughDevice(Communicator host, Communicator device, Context& ctx)
      : host_(std::move(host)), device_(std::move(device)), ctx_(ctx) {}

  int rank() const override { return device_.rank(); }
  int size() const override { return device_.size(); }

  absl::StatusOr<Request> Send(ConstTensorRef data, int peer, int tag) override {
    if (peer == rank()) return host_.Send(data, peer, tag);  // device tensors go to other ranks only
    auto state = std::make_unique<DeviceRequest>(ctx_);
    const TensorRef copy = state->Copy(data);
    return DeviceRequest::Started(std::move(state), device_.Send(copy, peer, tag));
  }
  absl::StatusOr<Request> Receive(TensorRef data, int peer, int tag) override {
    if (peer == rank()) return host_.Receive(data, peer, tag);
    auto state = std::make_unique<DeviceRequest>(ctx_);
    const TensorRef copy = state->CopyOfResult(data);
    return DeviceRequest::Started(std::move(state), device_.Receive(copy, peer, tag));
  }
  absl::StatusOr<Request> AllReduce(TensorRef data, ReduceOp op) override {
    auto state = std::make_unique<DeviceRequest>(ctx_);
    const TensorRef copy = state->CopyOfResult(data);
    return DeviceRequest::Started(std::move(state), device_.IAllReduce(copy, op));
  }
  absl::StatusOr<Request> ReduceScatter(ConstTensorRef in, TensorRef out) override {
    auto state = std::make_unique<DeviceRequest>(ctx_);
    const TensorRef in_copy = state->Copy(in), out_copy = state->CopyOfResult(out);
    return DeviceRequest::Started(std::move(state), device_.IReduceScatter(in_copy, out_copy));
  }
  absl::StatusOr<Request> AllGather(ConstTensorRef in, TensorRef out) override {
    auto state = std::make_unique<DeviceRequest>(ctx_);
    const TensorRef out_copy = state->CopyOfResult(out);
    const int64_t begin = in.elements() * rank();
    const bool in_place = in.raw() == static_cast<const char*>(out.raw()) + in.bytes() * rank();
    const TensorRef in_copy =
        in_place ? out_copy.Reshaped({out.elements()}).Rows(begin, begin + in.elements()) : state->Copy(in);
    return DeviceRequest::Started(std::move(state), device_.IAllGather(in_copy, out_copy));
  }
  absl::StatusOr<Request> Broadcast(TensorRef data, int root) override {
    auto state = std::make_unique<DeviceRequest>(ctx_);
    const TensorRef copy = state->CopyOfResult(data);
    return DeviceRequest::Started(std::move(state), device_.IBroadcast(copy, root));
  }
  absl::StatusOr<std::shared_ptr<CommBackend>> Split(int color, int key) override {
    ANNULUS_ASSIGN_OR_RETURN(Communicator host, host_.Split(color, key));
    ANNULUS_ASSIGN_OR_RETURN(Communicator device, device_.Split(color, key));
    return std::make_shared<ThroughDevice>(std::move(host), std::move(device), ctx_);
  }

 private:
  Communicator host_, device_;
  Context& ctx_;
};

// Ranks that wait on the host, in `host`, keep an operation on device tensors going for those that wait for
// it.
inline void CheckHostWaitsAdvance(Communicator host, Communicator device, Context& ctx) {
  Communicator through(std::make_shared<ThroughDevice>(host, device, ctx));
  std::vector<float> values(300000, 1.0f);
  absl::StatusOr<Request> sum = through.IAllReduce(RefOf(values), ReduceOp::kSum);
  ASSERT_TRUE(sum.ok());
  const bool barrier_first = host.rank() % 2 == 0;
  if (barrier_first) {
    ASSERT_TRUE(host.Barrier().ok());
  }
  ASSERT_TRUE(sum->Wait().ok());
  if (!barrier_first) {
    ASSERT_TRUE(host.Barrier().ok());
  }
  EXPECT_EQ(values, std::vector<float>(values.size(), static_cast<float>(host.size())));
}

}  // namespace annulus::testing
