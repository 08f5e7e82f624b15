// Ranks that are threads of one process. One mutex guards the group: matching a message or finishing a
// collective copies under it, so every access to user memory is ordered and a sanitizer sees real races only.

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <tuple>

#include "annulus/comm/communicator.h"
#include "progress.h"
#include "reduce.h"

namespace annulus {
namespace {

using Clock = std::chrono::steady_clock;

enum class Kind { kAllReduce, kReduceScatter, kAllGather, kBroadcast };

// One rank's side of an operation. Filled in by whoever completes the operation.
struct Side {
  ConstTensorRef in;
  TensorRef out;
  bool complete = false;
  absl::Status status;
};

struct Call {
  Kind kind = Kind::kAllReduce;
  ReduceOp op = ReduceOp::kSum;
  int root = 0;
  std::string signature = {};  // what all ranks must agree on
};

struct Collective {
  Call call;  // of the first arrival
  absl::Status disagreement;
  std::vector<std::shared_ptr<Side>> sides;  // by rank; null until it arrives
  int arrived = 0;
};

class Group {
 public:
  Group(int size, double timeout_seconds) : size_(size), timeout_seconds_(timeout_seconds) {}

  int size() const { return size_; }
  double timeout_seconds() const { return timeout_seconds_; }
  absl::StatusOr<std::shared_ptr<Side>> Send(ConstTensorRef data, int from, int to, int tag);
  absl::StatusOr<std::shared_ptr<Side>> Receive(TensorRef data, int from, int to, int tag);
  // The sequence-th collective of this group.
  absl::StatusOr<std::shared_ptr<Side>> Join(int64_t sequence, int rank, const Call& call, ConstTensorRef in,
                                             TensorRef out);
  absl::StatusOr<bool> Test(const Side& side, Clock::time_point posted);
  // The group that ranks of `color` form in the sequence-th split: `members` of them ask for it.
  std::shared_ptr<Group> Subgroup(int64_t sequence, int color, int members);

 private:
  struct Mailbox {
    std::deque<std::shared_ptr<Side>> sends, receives;  // at most one of the two is not empty
  };
  using Address = std::tuple<int, int, int>;  // from, to, tag

  static void Deliver(Side& send, Side& receive);
  void Finish(Collective& collective);

  const int size_;
  const double timeout_seconds_;
  std::mutex mutex_;
  absl::Status broken_;  // the first timeout
  std::map<Address, Mailbox> mailboxes_;
  std::map<int64_t, Collective> collectives_;
  std::map<std::pair<int64_t, int>, std::pair<std::shared_ptr<Group>, int>> subgroups_;  // group, takers left
};

std::string Describe(const ConstTensorRef& data) {
  return absl::StrCat(data.elements(), " ", Name(data.dtype()));
}

void CopyInto(const ConstTensorRef& from, void* to) {
  if (from.raw() != to && from.bytes() > 0) std::memcpy(to, from.raw(), static_cast<size_t>(from.bytes()));
}

void Group::Deliver(Side& send, Side& receive) {
  send.complete = receive.complete = true;
  if (send.in.bytes() == receive.out.bytes()) return CopyInto(send.in, receive.out.raw());
  send.status = receive.status = absl::InternalError(absl::StrCat(
      "a message of ", send.in.bytes(), " bytes meets a receive of ", receive.out.bytes(), " bytes"));
}

absl::StatusOr<std::shared_ptr<Side>> Group::Send(ConstTensorRef data, int from, int to, int tag) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ANNULUS_RETURN_IF_ERROR(broken_);
  Mailbox& box = mailboxes_[{from, to, tag}];
  auto side = std::make_shared<Side>(Side{.in = data, .out = {}, .complete = false, .status = {}});
  if (box.receives.empty()) {
    box.sends.push_back(side);
  } else {
    Deliver(*side, *box.receives.front());
    box.receives.pop_front();
  }
  return side;
}

absl::StatusOr<std::shared_ptr<Side>> Group::Receive(TensorRef data, int from, int to, int tag) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ANNULUS_RETURN_IF_ERROR(broken_);
  Mailbox& box = mailboxes_[{from, to, tag}];
  auto side = std::make_shared<Side>(Side{.in = {}, .out = data, .complete = false, .status = {}});
  if (box.sends.empty()) {
    box.receives.push_back(side);
  } else {
    Deliver(*box.sends.front(), *side);
    box.sends.pop_front();
  }
  return side;
}

absl::StatusOr<std::shared_ptr<Side>> Group::Join(int64_t sequence, int rank, const Call& call,
                                                  ConstTensorRef in, TensorRef out) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ANNULUS_RETURN_IF_ERROR(broken_);
  Collective& collective = collectives_[sequence];
  if (collective.arrived == 0) collective.call = call;
  collective.sides.resize(static_cast<size_t>(size_));
  auto side = std::make_shared<Side>(Side{.in = in, .out = out, .complete = false, .status = {}});
  collective.sides[static_cast<size_t>(rank)] = side;
  if (collective.call.signature != call.signature) {
    collective.disagreement =
        absl::InternalError(absl::StrCat("collective ", sequence, ": rank ", rank, " calls ", call.signature,
                                         ", others ", collective.call.signature));
  }
  if (++collective.arrived == size_) {
    Finish(collective);
    collectives_.erase(sequence);
  }
  return side;
}

void Group::Finish(Collective& collective) {
  const auto& sides = collective.sides;
  for (const auto& side : sides) {
    side->complete = true;
    side->status = collective.disagreement;
  }
  if (!collective.disagreement.ok()) return;
  const Side& first = *sides[0];
  switch (collective.call.kind) {
    case Kind::kBroadcast:
      for (const auto& side : sides)
        CopyInto(sides[static_cast<size_t>(collective.call.root)]->in, side->out.raw());
      return;
    case Kind::kAllGather:
      for (const auto& side : sides) {
        for (size_t r = 0; r < sides.size(); ++r) {
          CopyInto(sides[r]->in,
                   static_cast<char*>(side->out.raw()) + static_cast<int64_t>(r) * first.in.bytes());
        }
      }
      return;
    case Kind::kAllReduce:
    case Kind::kReduceScatter:
      break;
  }
  std::vector<char> sum(static_cast<size_t>(first.in.bytes()));
  std::vector<const void*> operands;
  for (const auto& side : sides) operands.push_back(side->in.raw());
  Reduce(first.in.dtype(), collective.call.op, operands, first.in.elements(), sum.data());
  int64_t offset = 0;
  for (const auto& side : sides) {
    const size_t bytes = static_cast<size_t>(side->out.bytes());
    if (bytes > 0) std::memcpy(side->out.raw(), sum.data() + offset, bytes);
    if (collective.call.kind == Kind::kReduceScatter) offset += side->out.bytes();
  }
}

absl::StatusOr<bool> Group::Test(const Side& side, Clock::time_point posted) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (side.complete) {
    ANNULUS_RETURN_IF_ERROR(side.status);
    return true;
  }
  ANNULUS_RETURN_IF_ERROR(broken_);
  if (std::chrono::duration<double>(Clock::now() - posted).count() > timeout_seconds_) {
    broken_ = absl::DeadlineExceededError(absl::StrCat(
        "loopback group of ", size_, ": an operation is not complete after ", timeout_seconds_, " s"));
    return broken_;
  }
  return false;
}

std::shared_ptr<Group> Group::Subgroup(int64_t sequence, int color, int members) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto& [group, takers] = subgroups_[{sequence, color}];
  if (group == nullptr) {
    group = std::make_shared<Group>(members, timeout_seconds_);
    takers = members;
  }
  const std::shared_ptr<Group> result = group;
  if (--takers == 0) subgroups_.erase({sequence, color});
  return result;
}

class LoopbackRequest : public RequestState {
 public:
  LoopbackRequest(std::shared_ptr<Group> group, std::shared_ptr<CommProgress> progress,
                  std::shared_ptr<Side> side)
      : group_(std::move(group)),
        progress_(std::move(progress)),
        side_(std::move(side)),
        posted_(Clock::now()) {}
  absl::StatusOr<bool> Test() override {
    progress_->Poll();
    return group_->Test(*side_, posted_);
  }

 private:
  std::shared_ptr<Group> group_;
  std::shared_ptr<CommProgress> progress_;
  std::shared_ptr<Side> side_;
  Clock::time_point posted_;
};

class LoopbackComm : public CommBackend {
 public:
  LoopbackComm(std::shared_ptr<Group> group, int rank, std::shared_ptr<CommProgress> progress)
      : group_(std::move(group)), progress_(std::move(progress)), rank_(rank) {}

  int rank() const override { return rank_; }
  int size() const override { return group_->size(); }

  absl::StatusOr<Request> Send(ConstTensorRef data, int peer, int tag) override {
    CheckPeer(peer, tag);
    return Started(group_->Send(data, rank_, peer, tag));
  }
  absl::StatusOr<Request> Receive(TensorRef data, int peer, int tag) override {
    CheckPeer(peer, tag);
    return Started(group_->Receive(data, peer, rank_, tag));
  }
  absl::StatusOr<Request> AllReduce(TensorRef data, ReduceOp op) override {
    const std::string signature = absl::StrCat("AllReduce of ", Describe(data), " op ", static_cast<int>(op));
    return Joined({.kind = Kind::kAllReduce, .op = op, .signature = signature}, data, data);
  }
  absl::StatusOr<Request> ReduceScatter(ConstTensorRef in, TensorRef out) override {
    ANNULUS_CHECK(in.elements() == out.elements() * size() && in.dtype() == out.dtype())
        << Describe(in) << " -> " << Describe(out);
    const std::string signature = absl::StrCat("ReduceScatter of ", Describe(in));
    return Joined({.kind = Kind::kReduceScatter, .signature = signature}, in, out);
  }
  absl::StatusOr<Request> AllGather(ConstTensorRef in, TensorRef out) override {
    ANNULUS_CHECK(in.elements() * size() == out.elements() && in.dtype() == out.dtype())
        << Describe(in) << " -> " << Describe(out);
    return Joined({.kind = Kind::kAllGather, .signature = absl::StrCat("AllGather of ", Describe(in))}, in,
                  out);
  }
  absl::StatusOr<Request> Broadcast(TensorRef data, int root) override {
    ANNULUS_CHECK(0 <= root && root < size()) << "root " << root;
    const std::string signature = absl::StrCat("Broadcast of ", Describe(data), " from ", root);
    return Joined({.kind = Kind::kBroadcast, .root = root, .signature = signature}, data, data);
  }
  absl::StatusOr<std::shared_ptr<CommBackend>> Split(int color, int key) override;
  std::shared_ptr<CommProgress> progress() const override { return progress_; }

 private:
  void CheckPeer(int peer, int tag) const {
    ANNULUS_CHECK(0 <= peer && peer < size() && 0 <= tag && tag < Communicator::kMaxTag)
        << "rank " << rank_ << ", peer " << peer << " of " << size() << ", tag " << tag;
  }
  absl::StatusOr<Request> Started(absl::StatusOr<std::shared_ptr<Side>> side) {
    ANNULUS_RETURN_IF_ERROR(side.status());
    return Request(std::make_unique<LoopbackRequest>(group_, progress_, *std::move(side)));
  }
  absl::StatusOr<Request> Joined(const Call& call, ConstTensorRef in, TensorRef out) {
    return Started(group_->Join(sequence_++, rank_, call, in, out));
  }

  std::shared_ptr<Group> group_;
  std::shared_ptr<CommProgress> progress_;  // of this rank's operations in all groups
  const int rank_;
  int64_t sequence_ = 0;  // collectives called so far
};

absl::StatusOr<std::shared_ptr<CommBackend>> LoopbackComm::Split(int color, int key) {
  std::vector<int32_t> mine = {color, key}, all(2 * static_cast<size_t>(size()));
  const int64_t split = sequence_;
  ANNULUS_ASSIGN_OR_RETURN(
      Request request, AllGather(TensorRef(mine.data(), DType::kI32, Device{}, Shape{2}),
                                 TensorRef(all.data(), DType::kI32, Device{}, Shape{2 * int64_t{size()}})));
  ANNULUS_RETURN_IF_ERROR(request.Wait());
  std::vector<std::pair<int, int>> members;  // key, rank
  for (int r = 0; r < size(); ++r) {
    const size_t at = 2 * static_cast<size_t>(r);
    if (all[at] == color) members.emplace_back(all[at + 1], r);
  }
  std::sort(members.begin(), members.end());
  const auto self = std::find(members.begin(), members.end(), std::make_pair(key, rank_));
  return std::make_shared<LoopbackComm>(group_->Subgroup(split, color, static_cast<int>(members.size())),
                                        static_cast<int>(self - members.begin()), progress_);
}

}  // namespace

std::vector<Communicator> MakeLoopbackGroup(int size, double timeout_seconds) {
  ANNULUS_CHECK(size >= 1) << "size " << size;
  const auto group = std::make_shared<Group>(size, timeout_seconds);
  std::vector<Communicator> comms;
  for (int r = 0; r < size; ++r)
    comms.emplace_back(std::make_shared<LoopbackComm>(group, r, std::make_shared<CommProgress>()));
  return comms;
}

}  // namespace annulus
