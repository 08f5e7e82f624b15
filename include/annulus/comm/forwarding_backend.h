#pragma once

// A group that does something of its own with some calls and hands all others on to an inner group: what
// delays, throttles or rounds messages overrides Send and Receive alone.
//
//   class LoggedBackend : public ForwardingBackend {
//     absl::StatusOr<Request> Send(ConstTensorRef data, int peer, int tag) override {
//       Log(data);
//       return inner().Send(data, peer, tag);
//     }
//     absl::StatusOr<std::shared_ptr<CommBackend>> Split(int color, int key) override { ... }
//   };
//
// Split is left to each: handed on, it would give groups without what the outer one does.

#include <memory>
#include <utility>

#include "annulus/comm/communicator.h"

namespace annulus {

class ForwardingBackend : public CommBackend {
 public:
  explicit ForwardingBackend(Communicator inner) : inner_(std::move(inner)) {}

  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  absl::StatusOr<Request> Send(ConstTensorRef data, int peer, int tag) override {
    return inner_.Send(data, peer, tag);
  }
  absl::StatusOr<Request> Receive(TensorRef data, int peer, int tag) override {
    return inner_.Receive(data, peer, tag);
  }
  absl::StatusOr<Request> AllReduce(TensorRef data, ReduceOp op) override {
    return inner_.IAllReduce(data, op);
  }
  absl::StatusOr<Request> ReduceScatter(ConstTensorRef in, TensorRef out) override {
    return inner_.IReduceScatter(in, out);
  }
  absl::StatusOr<Request> AllGather(ConstTensorRef in, TensorRef out) override {
    return inner_.IAllGather(in, out);
  }
  absl::StatusOr<Request> Broadcast(TensorRef data, int root) override {
    return inner_.IBroadcast(data, root);
  }
  std::shared_ptr<CommProgress> progress() const override { return inner_.progress(); }
  absl::Status Health() override { return inner_.Health(); }
  void Abort() override { inner_.Abort(); }

 protected:
  Communicator& inner() { return inner_; }

 private:
  Communicator inner_;
};

}  // namespace annulus
