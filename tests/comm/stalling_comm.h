#pragma once

// A group in which anything may be late: a message is posted some time after the call, and seen to be
// complete some time after it is. Most times are short, some are long; they are drawn from a seed.

#include <chrono>

#include "annulus/base/random.h"
#include "annulus/comm/forwarding_backend.h"

namespace annulus::testing {

class StalledMessage : public RequestState {
 public:
  using Clock = std::chrono::steady_clock;
  using Post = std::function<absl::StatusOr<Request>()>;
  StalledMessage(Post post, Clock::duration until_posted, Clock::duration until_seen)
      : post_(std::move(post)), next_(Clock::now() + until_posted), until_seen_(until_seen) {}

  absl::StatusOr<bool> Test() override {
    if (stage_ == Stage::kHeldBack && Clock::now() >= next_) {
      ANNULUS_ASSIGN_OR_RETURN(posted_, post_());
      stage_ = Stage::kPosted;
    }
    if (stage_ == Stage::kPosted) {
      ANNULUS_ASSIGN_OR_RETURN(const bool complete, posted_.Test());
      if (complete) stage_ = Stage::kComplete, next_ = Clock::now() + until_seen_;
    }
    return stage_ == Stage::kComplete && Clock::now() >= next_;
  }

 private:
  enum class Stage { kHeldBack, kPosted, kComplete };
  const Post post_;
  Clock::time_point next_;
  const Clock::duration until_seen_;
  Stage stage_ = Stage::kHeldBack;
  Request posted_;
};

class StallingComm : public ForwardingBackend {
 public:
  StallingComm(Communicator inner, uint64_t seed)
      : ForwardingBackend(std::move(inner)), random_(seed, absl::StrCat("stalls of rank ", rank())) {}

  absl::StatusOr<Request> Send(ConstTensorRef data, int peer, int tag) override {
    return Stalled([=, this] { return inner().Send(data, peer, tag); });
  }
  absl::StatusOr<Request> Receive(TensorRef data, int peer, int tag) override {
    return Stalled([=, this] { return inner().Receive(data, peer, tag); });
  }
  absl::StatusOr<std::shared_ptr<CommBackend>> Split(int, int) override {
    return absl::UnimplementedError("groups are not split from one that stalls");
  }

 private:
  std::chrono::microseconds Draw() {
    constexpr uint64_t kShortUs = 200, kLongUs = 3000, kOneLongIn = 32;
    const bool is_long = random_.Below(draw_++, kOneLongIn) == 0;
    return std::chrono::microseconds(random_.Below(draw_++, is_long ? kLongUs : kShortUs));
  }
  absl::StatusOr<Request> Stalled(StalledMessage::Post post) {
    const auto until_posted = Draw(), until_seen = Draw();
    return Request(std::make_unique<StalledMessage>(std::move(post), until_posted, until_seen));
  }

  const RandomStream random_;
  uint64_t draw_ = 0;
};

inline Communicator WithRandomStalls(Communicator comm, uint64_t seed) {
  return Communicator(std::make_shared<StallingComm>(std::move(comm), seed));
}

}  // namespace annulus::testing
