#include "annulus/comm/communicator.h"

#include <algorithm>

#include "backoff.h"

namespace annulus {
namespace {

constexpr char kAgreedPayload[] = "annulus/agreed";  // marks a status that every rank has

template <typename T>
TensorRef HostRef(T* data, int64_t elements) {
  return TensorRef(data, DTypeOf<T>(), Device{}, Shape{elements});
}

absl::Status WaitFor(absl::StatusOr<Request> request) {
  ANNULUS_RETURN_IF_ERROR(request.status());
  return request->Wait();
}

}  // namespace

absl::Status RequestState::Wait() {
  Backoff backoff;
  while (true) {
    ANNULUS_ASSIGN_OR_RETURN(const bool complete, Test());
    if (complete) return absl::OkStatus();
    backoff.Pause();
  }
}

Request& Request::operator=(Request&& other) noexcept {
  if (this == &other) return *this;
  ANNULUS_CHECK(state_ == nullptr) << "an incomplete request is overwritten";
  state_ = std::move(other.state_);
  return *this;
}

Request::~Request() { ANNULUS_CHECK(state_ == nullptr) << "an incomplete request is destroyed"; }

absl::StatusOr<bool> Request::Test() {
  if (state_ == nullptr) return true;
  absl::StatusOr<bool> complete = state_->Test();
  if (!complete.ok() || *complete) state_ = nullptr;
  return complete;
}

absl::Status Request::Wait() {
  if (state_ == nullptr) return absl::OkStatus();
  const absl::Status status = state_->Wait();
  state_ = nullptr;
  return status;
}

absl::Status Communicator::AllReduce(TensorRef data, ReduceOp op) {
  return WaitFor(backend_->AllReduce(data, op));
}

absl::Status Communicator::ReduceScatter(ConstTensorRef in, TensorRef out) {
  return WaitFor(backend_->ReduceScatter(in, out));
}

absl::Status Communicator::AllGather(ConstTensorRef in, TensorRef out) {
  return WaitFor(backend_->AllGather(in, out));
}

absl::Status Communicator::Broadcast(TensorRef data, int root) {
  return WaitFor(backend_->Broadcast(data, root));
}

absl::Status Communicator::Barrier() { return AllReduceValue(0, ReduceOp::kMax).status(); }

absl::StatusOr<std::string> Communicator::BroadcastString(const std::string& value, int root) {
  int64_t length = static_cast<int64_t>(value.size());
  ANNULUS_RETURN_IF_ERROR(Broadcast(HostRef(&length, 1), root));
  std::string result = value;
  result.resize(static_cast<size_t>(length));
  ANNULUS_RETURN_IF_ERROR(Broadcast(HostRef(reinterpret_cast<uint8_t*>(result.data()), length), root));
  return result;
}

absl::StatusOr<std::vector<std::string>> Communicator::AllGatherStrings(const std::string& value) {
  const size_t ranks = static_cast<size_t>(size());
  int64_t length = static_cast<int64_t>(value.size());
  std::vector<int64_t> lengths(ranks);
  ANNULUS_RETURN_IF_ERROR(AllGather(HostRef(&length, 1), HostRef(lengths.data(), size())));
  const int64_t longest = *std::max_element(lengths.begin(), lengths.end());

  std::vector<uint8_t> mine(static_cast<size_t>(longest)), all(static_cast<size_t>(longest) * ranks);
  std::copy(value.begin(), value.end(), mine.begin());
  ANNULUS_RETURN_IF_ERROR(AllGather(HostRef(mine.data(), longest), HostRef(all.data(), longest * size())));
  std::vector<std::string> result;
  for (size_t r = 0; r < ranks; ++r) {
    const auto begin = all.begin() + static_cast<std::ptrdiff_t>(r) * longest;
    result.emplace_back(begin, begin + lengths[r]);
  }
  return result;
}

absl::StatusOr<double> Communicator::AllReduceValue(double value, ReduceOp op) {
  ANNULUS_RETURN_IF_ERROR(AllReduce(HostRef(&value, 1), op));
  return value;
}

bool IsAgreed(const absl::Status& status) { return status.GetPayload(kAgreedPayload).has_value(); }

absl::Status Communicator::AgreeOk(const absl::Status& status) {
  int32_t lowest = status.ok() ? size() : rank();
  ANNULUS_RETURN_IF_ERROR(AllReduce(HostRef(&lowest, 1), ReduceOp::kMin));
  if (lowest == size()) return absl::OkStatus();

  int32_t failed = status.ok() ? 0 : 1;
  ANNULUS_RETURN_IF_ERROR(AllReduce(HostRef(&failed, 1), ReduceOp::kSum));
  int32_t code = static_cast<int32_t>(status.code());
  ANNULUS_RETURN_IF_ERROR(Broadcast(HostRef(&code, 1), lowest));
  ANNULUS_ASSIGN_OR_RETURN(const std::string message, BroadcastString(std::string(status.message()), lowest));
  const std::string where = failed == size() ? "" : absl::StrCat("rank ", lowest, ": ");
  absl::Status agreed(static_cast<absl::StatusCode>(code), where + message);
  agreed.SetPayload(kAgreedPayload, absl::Cord());
  return agreed;
}

absl::StatusOr<Communicator> Communicator::Split(int color, int key) {
  ANNULUS_CHECK(color >= 0) << "color " << color;
  ANNULUS_ASSIGN_OR_RETURN(std::shared_ptr<CommBackend> group, backend_->Split(color, key));
  return Communicator(std::move(group));
}

}  // namespace annulus
