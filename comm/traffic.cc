#include "annulus/comm/traffic.h"

#include <utility>

#include "absl/strings/numbers.h"
#include "annulus/comm/forwarding_backend.h"

namespace annulus {
namespace {

class CountedBackend : public ForwardingBackend {
 public:
  CountedBackend(Communicator inner, std::vector<int> world_ranks, std::shared_ptr<TrafficCounter> counter)
      : ForwardingBackend(std::move(inner)),
        world_ranks_(std::move(world_ranks)),
        counter_(std::move(counter)) {}

  static absl::StatusOr<std::shared_ptr<CommBackend>> Create(Communicator inner,
                                                             std::shared_ptr<TrafficCounter> counter) {
    ANNULUS_ASSIGN_OR_RETURN(const std::vector<std::string> texts,
                             inner.AllGatherStrings(absl::StrCat(counter->world_rank())));
    std::vector<int> world_ranks;
    for (const std::string& text : texts) {
      ANNULUS_CHECK(absl::SimpleAtoi(text, &world_ranks.emplace_back())) << text;
    }
    return std::make_shared<CountedBackend>(std::move(inner), std::move(world_ranks), std::move(counter));
  }

  absl::StatusOr<Request> Send(ConstTensorRef data, int peer, int tag) override {
    counter_->Add(world_ranks_[static_cast<size_t>(peer)], data.bytes());
    return inner().Send(data, peer, tag);
  }
  absl::StatusOr<Request> AllReduce(TensorRef data, ReduceOp op) override {
    AddToNext(2 * data.bytes() * (size() - 1) / size());
    return inner().IAllReduce(data, op);
  }
  absl::StatusOr<Request> ReduceScatter(ConstTensorRef in, TensorRef out) override {
    AddToNext(out.bytes() * (size() - 1));
    return inner().IReduceScatter(in, out);
  }
  absl::StatusOr<Request> AllGather(ConstTensorRef in, TensorRef out) override {
    AddToNext(in.bytes() * (size() - 1));
    return inner().IAllGather(in, out);
  }
  absl::StatusOr<Request> Broadcast(TensorRef data, int root) override {
    if (Next() != root) AddToNext(data.bytes());
    return inner().IBroadcast(data, root);
  }
  absl::StatusOr<std::shared_ptr<CommBackend>> Split(int color, int key) override {
    ANNULUS_ASSIGN_OR_RETURN(Communicator part, inner().Split(color, key));
    return Create(std::move(part), counter_);
  }

 private:
  int Next() const { return (rank() + 1) % size(); }
  void AddToNext(int64_t bytes) { counter_->Add(world_ranks_[static_cast<size_t>(Next())], bytes); }

  const std::vector<int> world_ranks_;
  const std::shared_ptr<TrafficCounter> counter_;
};

}  // namespace

void TrafficCounter::Add(int to_world_rank, int64_t bytes) {
  if (to_world_rank == world_rank_) return;
  const auto host = [this](int rank) -> const std::string& { return hosts_[static_cast<size_t>(rank)]; };
  (host(to_world_rank) == host(world_rank_) ? sent_.inside_hosts_bytes : sent_.between_hosts_bytes) += bytes;
}

SentTraffic TrafficCounter::Take() { return std::exchange(sent_, SentTraffic()); }

absl::StatusOr<Communicator> WithTraffic(Communicator group, std::shared_ptr<TrafficCounter> counter) {
  ANNULUS_ASSIGN_OR_RETURN(std::shared_ptr<CommBackend> counted,
                           CountedBackend::Create(std::move(group), std::move(counter)));
  return Communicator(std::move(counted));
}

}  // namespace annulus
