// A group whose messages take longer. Every message is preceded by a header with its send time, over a twin
// group so that tags stay the caller's; the receiver holds the message back until send time + delay.

#include <chrono>

#include "annulus/comm/forwarding_backend.h"

namespace annulus {
namespace {

int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

class DelayedRequest : public RequestState {
 public:
  // A send is complete when its data has left; a receive waits for the delay as well.
  enum class Side { kSend, kReceive };
  DelayedRequest(Side side, int64_t delay_ns) : side_(side), delay_ns_(delay_ns), sent_ns_(NowNs()) {}

  TensorRef header() { return TensorRef(&sent_ns_, DType::kI64, Device{}, Shape{1}); }
  void Track(Request header, Request data) {
    header_ = std::move(header);
    data_ = std::move(data);
  }

  absl::StatusOr<bool> Test() override {
    ANNULUS_ASSIGN_OR_RETURN(const bool header, header_.Test());
    ANNULUS_ASSIGN_OR_RETURN(const bool data, data_.Test());
    return header && data && (side_ == Side::kSend || NowNs() >= sent_ns_ + delay_ns_);
  }

 private:
  const Side side_;
  const int64_t delay_ns_;
  int64_t sent_ns_;
  Request header_, data_;
};

class DelayComm : public ForwardingBackend {
 public:
  DelayComm(Communicator inner, Communicator headers, int64_t delay_ns)
      : ForwardingBackend(std::move(inner)), headers_(std::move(headers)), delay_ns_(delay_ns) {}

  static absl::StatusOr<std::shared_ptr<DelayComm>> Create(Communicator inner, int64_t delay_ns) {
    ANNULUS_ASSIGN_OR_RETURN(Communicator headers, inner.Split(0, inner.rank()));
    return std::make_shared<DelayComm>(std::move(inner), std::move(headers), delay_ns);
  }

  absl::StatusOr<Request> Send(ConstTensorRef data, int peer, int tag) override {
    auto state = std::make_unique<DelayedRequest>(DelayedRequest::Side::kSend, delay_ns_);
    ANNULUS_ASSIGN_OR_RETURN(Request header, headers_.Send(state->header(), peer, tag));
    ANNULUS_ASSIGN_OR_RETURN(Request body, inner().Send(data, peer, tag));
    state->Track(std::move(header), std::move(body));
    return Request(std::move(state));
  }
  absl::StatusOr<Request> Receive(TensorRef data, int peer, int tag) override {
    auto state = std::make_unique<DelayedRequest>(DelayedRequest::Side::kReceive, delay_ns_);
    ANNULUS_ASSIGN_OR_RETURN(Request header, headers_.Receive(state->header(), peer, tag));
    ANNULUS_ASSIGN_OR_RETURN(Request body, inner().Receive(data, peer, tag));
    state->Track(std::move(header), std::move(body));
    return Request(std::move(state));
  }
  absl::StatusOr<std::shared_ptr<CommBackend>> Split(int color, int key) override {
    ANNULUS_ASSIGN_OR_RETURN(Communicator part, inner().Split(color, key));
    ANNULUS_ASSIGN_OR_RETURN(std::shared_ptr<DelayComm> group, Create(std::move(part), delay_ns_));
    return std::shared_ptr<CommBackend>(std::move(group));
  }

 private:
  Communicator headers_;
  const int64_t delay_ns_;
};

}  // namespace

Communicator WithMessageDelay(Communicator comm, double delay_us) {
  ANNULUS_CHECK(delay_us >= 0) << "delay_us " << delay_us;
  absl::StatusOr<std::shared_ptr<DelayComm>> delayed =
      DelayComm::Create(std::move(comm), static_cast<int64_t>(delay_us * 1000));
  ANNULUS_CHECK_OK(delayed.status());
  return Communicator(*std::move(delayed));
}

}  // namespace annulus
