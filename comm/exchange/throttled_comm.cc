#include "throttled_comm.h"

#include <algorithm>
#include <chrono>

#include "annulus/comm/forwarding_backend.h"

namespace annulus {
namespace {

int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// What one end of a message tells the other.
TensorRef Ref(int64_t& word) { return TensorRef(&word, DType::kI64, Device{}, Shape{1}); }

class ThrottledReceive : public RequestState {
 public:
  static absl::StatusOr<Request> Start(Communicator& requests, Communicator& ends, Communicator& inner,
                                       TensorRef data, int peer, int tag) {
    auto state = std::make_unique<ThrottledReceive>();
    ANNULUS_ASSIGN_OR_RETURN(state->requested_, requests.Send(Ref(state->request_), peer, tag));
    ANNULUS_ASSIGN_OR_RETURN(state->ended_, ends.Receive(Ref(state->end_ns_), peer, tag));
    ANNULUS_ASSIGN_OR_RETURN(state->data_, inner.Receive(data, peer, tag));
    return Request(std::move(state));
  }

  absl::StatusOr<bool> Test() override {
    for (Request* part : {&requested_, &ended_, &data_}) {
      ANNULUS_ASSIGN_OR_RETURN(const bool complete, part->Test());
      if (!complete) return false;
    }
    return NowNs() >= end_ns_;
  }

 private:
  int64_t request_ = 0, end_ns_ = 0;
  Request requested_, ended_, data_;
};

class ThrottledSend : public RequestState {
 public:
  struct Message {
    Communicator inner, ends;
    ConstTensorRef data;
    int peer, tag;
    int64_t duration_ns;
    std::shared_ptr<int64_t> link_free_ns;  // when the link to the peer is
  };
  explicit ThrottledSend(Message message) : message_(std::move(message)) {}

  static absl::StatusOr<Request> Start(Communicator& requests, Message message) {
    const int peer = message.peer, tag = message.tag;
    auto state = std::make_unique<ThrottledSend>(std::move(message));
    ANNULUS_ASSIGN_OR_RETURN(state->requested_, requests.Receive(Ref(state->request_), peer, tag));
    return Request(std::move(state));
  }

  absl::StatusOr<bool> Test() override {
    if (!takes_link_) {
      ANNULUS_ASSIGN_OR_RETURN(takes_link_, requested_.Test());
      if (!takes_link_) return false;
      ANNULUS_RETURN_IF_ERROR(TakeLink());
    }
    for (Request* part : {&ended_, &data_}) {
      ANNULUS_ASSIGN_OR_RETURN(const bool complete, part->Test());
      if (!complete) return false;
    }
    return NowNs() >= end_ns_;
  }

 private:
  absl::Status TakeLink() {
    int64_t& free_ns = *message_.link_free_ns;
    end_ns_ = free_ns = std::max(free_ns, NowNs()) + message_.duration_ns;
    ANNULUS_ASSIGN_OR_RETURN(ended_, message_.ends.Send(Ref(end_ns_), message_.peer, message_.tag));
    ANNULUS_ASSIGN_OR_RETURN(data_, message_.inner.Send(message_.data, message_.peer, message_.tag));
    return absl::OkStatus();
  }

  Message message_;
  int64_t request_ = 0, end_ns_ = 0;
  bool takes_link_ = false;
  Request requested_, ended_, data_;
};

class ThrottledComm : public ForwardingBackend {
 public:
  static absl::StatusOr<std::shared_ptr<CommBackend>> Create(Communicator inner, double bytes_per_second) {
    auto comm = std::make_shared<ThrottledComm>(std::move(inner), bytes_per_second);
    Communicator& group = comm->inner();
    ANNULUS_ASSIGN_OR_RETURN(comm->requests_, group.Split(0, group.rank()));
    ANNULUS_ASSIGN_OR_RETURN(comm->ends_, group.Split(0, group.rank()));
    for (int r = 0; r < group.size(); ++r) comm->link_free_ns_.push_back(std::make_shared<int64_t>(0));
    return std::shared_ptr<CommBackend>(std::move(comm));
  }
  ThrottledComm(Communicator inner, double bytes_per_second)
      : ForwardingBackend(std::move(inner)), bytes_per_second_(bytes_per_second) {}

  absl::StatusOr<Request> Send(ConstTensorRef data, int peer, int tag) override {
    const double seconds = static_cast<double>(data.bytes()) / bytes_per_second_;
    return ThrottledSend::Start(requests_, {.inner = inner(),
                                            .ends = ends_,
                                            .data = data,
                                            .peer = peer,
                                            .tag = tag,
                                            .duration_ns = static_cast<int64_t>(seconds * 1e9),
                                            .link_free_ns = link_free_ns_[static_cast<size_t>(peer)]});
  }
  absl::StatusOr<Request> Receive(TensorRef data, int peer, int tag) override {
    return ThrottledReceive::Start(requests_, ends_, inner(), data, peer, tag);
  }
  absl::StatusOr<std::shared_ptr<CommBackend>> Split(int color, int key) override {
    ANNULUS_ASSIGN_OR_RETURN(Communicator part, inner().Split(color, key));
    return Create(std::move(part), bytes_per_second_);
  }

 private:
  Communicator requests_, ends_;
  const double bytes_per_second_;
  std::vector<std::shared_ptr<int64_t>> link_free_ns_;  // by peer
};

}  // namespace

absl::StatusOr<Communicator> WithLinkRate(Communicator inner, double bytes_per_second) {
  ANNULUS_CHECK(bytes_per_second > 0) << bytes_per_second;
  ANNULUS_ASSIGN_OR_RETURN(std::shared_ptr<CommBackend> backend,
                           ThrottledComm::Create(std::move(inner), bytes_per_second));
  return Communicator(std::move(backend));
}

}  // namespace annulus
