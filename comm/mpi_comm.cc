#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "annulus/base/host.h"
#include "annulus/comm/communicator.h"
#include "backoff.h"
#include "mpi_internal.h"

namespace annulus {
namespace {

// Whether any MPI call of this process failed. MPI itself is one per process.
std::atomic<bool> mpi_failed{false};

bool MpiFinalized() {
  int finalized = 0;
  MPI_Finalized(&finalized);
  return finalized != 0;
}

class MpiRequest : public RequestState {
 public:
  MpiRequest(std::shared_ptr<CommProgress> progress) : progress_(std::move(progress)) {}
  ~MpiRequest() override {
    for (MPI_Datatype& type : types_) MPI_Type_free(&type);
  }
  MpiParts& parts() { return parts_; }
  // Freed once the operation that uses it is complete.
  void Own(MPI_Datatype type) { types_.push_back(type); }

  absl::StatusOr<bool> Test() override {
    progress_->Poll();
    return parts_.Test();
  }

 private:
  const std::shared_ptr<CommProgress> progress_;
  MpiParts parts_;
  std::vector<MPI_Datatype> types_;
};

// A duplicated communicator, so that its messages cannot meet those of others.
class MpiGroup {
 public:
  static absl::StatusOr<std::unique_ptr<MpiGroup>> Duplicate(MPI_Comm comm) {
    MPI_Comm copy;
    ANNULUS_MPI(MPI_Comm_dup(comm, &copy));
    auto group = std::make_unique<MpiGroup>(copy);
    AwaitedByMpi().AddGroup(copy);
    ANNULUS_MPI(MPI_Comm_set_errhandler(copy, MPI_ERRORS_RETURN));
    return group;
  }
  explicit MpiGroup(MPI_Comm comm) : comm_(comm) {}
  MpiGroup(const MpiGroup&) = delete;
  MpiGroup& operator=(const MpiGroup&) = delete;
  ~MpiGroup() {
    AwaitedByMpi().RemoveGroup(comm_);
    if (!MpiFinalized()) MPI_Comm_free(&comm_);
  }
  MPI_Comm get() const { return comm_; }

 private:
  MPI_Comm comm_;
};

class MpiComm : public CommBackend {
 public:
  static absl::StatusOr<std::shared_ptr<CommBackend>> Create(MPI_Comm comm,
                                                             std::shared_ptr<CommProgress> progress) {
    std::shared_ptr<MpiComm> result(new MpiComm);
    ANNULUS_ASSIGN_OR_RETURN(result->group_, MpiGroup::Duplicate(comm));
    ANNULUS_ASSIGN_OR_RETURN(result->reductions_, MpiGroup::Duplicate(comm));
    ANNULUS_MPI(MPI_Comm_rank(comm, &result->rank_));
    ANNULUS_MPI(MPI_Comm_size(comm, &result->size_));
    result->progress_ = std::move(progress);
    return std::shared_ptr<CommBackend>(std::move(result));
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  absl::StatusOr<Request> Send(ConstTensorRef data, int peer, int tag) override;
  absl::StatusOr<Request> Receive(TensorRef data, int peer, int tag) override;
  absl::StatusOr<Request> AllReduce(TensorRef data, ReduceOp op) override;
  absl::StatusOr<Request> ReduceScatter(ConstTensorRef in, TensorRef out) override;
  absl::StatusOr<Request> AllGather(ConstTensorRef in, TensorRef out) override;
  absl::StatusOr<Request> Broadcast(TensorRef data, int root) override;
  absl::StatusOr<std::shared_ptr<CommBackend>> Split(int color, int key) override;
  std::shared_ptr<CommProgress> progress() const override { return progress_; }

 private:
  MpiComm() = default;
  void CheckPeer(int peer, int tag) const {
    ANNULUS_CHECK(0 <= peer && peer < size_ && 0 <= tag && tag < Communicator::kMaxTag)
        << "rank " << rank_ << ", peer " << peer << " of " << size_ << ", tag " << tag;
  }
  int NextReductionTag() { return reduction_tag_ = (reduction_tag_ + 1) % Communicator::kMaxTag; }

  std::unique_ptr<MpiGroup> group_;       // messages of the caller, broadcasts, all-gathers
  std::unique_ptr<MpiGroup> reductions_;  // messages of reductions
  std::shared_ptr<CommProgress> progress_;
  int rank_ = 0, size_ = 1;
  int reduction_tag_ = 0;  // differs between reductions under way; the same on every rank
};

absl::StatusOr<Request> MpiComm::Send(ConstTensorRef data, int peer, int tag) {
  CheckPeer(peer, tag);
  auto request = std::make_unique<MpiRequest>(progress_);
  ANNULUS_RETURN_IF_ERROR(
      request->parts().Send(data.raw(), data.dtype(), data.elements(), peer, tag, group_->get()));
  return Request(std::move(request));
}

absl::StatusOr<Request> MpiComm::Receive(TensorRef data, int peer, int tag) {
  CheckPeer(peer, tag);
  auto request = std::make_unique<MpiRequest>(progress_);
  ANNULUS_RETURN_IF_ERROR(
      request->parts().Receive(data.raw(), data.dtype(), data.elements(), peer, tag, group_->get()));
  return Request(std::move(request));
}

absl::StatusOr<Request> MpiComm::AllReduce(TensorRef data, ReduceOp op) {
  std::vector<int64_t> offsets;
  const int64_t whole = data.elements() / size_, rest = data.elements() % size_;
  for (int64_t p = 0; p <= size_; ++p) offsets.push_back(p * whole + std::min(p, rest));
  void* out = static_cast<char*>(data.raw()) + offsets[static_cast<size_t>(rank_)] * SizeOf(data.dtype());
  return Request(StartReduction({.comm = reductions_->get(),
                                 .tag = NextReductionTag(),
                                 .dtype = data.dtype(),
                                 .op = op,
                                 .in = data.raw(),
                                 .offsets = std::move(offsets),
                                 .out = out,
                                 .gathered = data.raw()},
                                progress_));
}

absl::StatusOr<Request> MpiComm::ReduceScatter(ConstTensorRef in, TensorRef out) {
  ANNULUS_CHECK(in.elements() == out.elements() * size_ && in.dtype() == out.dtype())
      << ToString(in.shape()) << " -> " << ToString(out.shape());
  std::vector<int64_t> offsets;
  for (int64_t p = 0; p <= size_; ++p) offsets.push_back(p * out.elements());
  return Request(StartReduction({.comm = reductions_->get(),
                                 .tag = NextReductionTag(),
                                 .dtype = in.dtype(),
                                 .op = ReduceOp::kSum,
                                 .in = in.raw(),
                                 .offsets = std::move(offsets),
                                 .out = out.raw(),
                                 .gathered = nullptr},
                                progress_));
}

absl::StatusOr<Request> MpiComm::AllGather(ConstTensorRef in, TensorRef out) {
  ANNULUS_CHECK(in.elements() * size_ == out.elements() && in.dtype() == out.dtype())
      << ToString(in.shape()) << " -> " << ToString(out.shape());
  const int64_t width = SizeOf(in.dtype());
  const bool in_place = in.raw() == static_cast<char*>(out.raw()) + rank_ * in.bytes();
  auto request = std::make_unique<MpiRequest>(progress_);
  for (int64_t begin = 0; begin < in.elements(); begin += kPieceElements) {
    // The pieces of consecutive ranks lie in.elements() apart.
    const int count = static_cast<int>(std::min(kPieceElements, in.elements() - begin));
    MPI_Datatype piece, spaced;
    ANNULUS_MPI(MPI_Type_contiguous(count, MpiType(in.dtype()), &piece));
    ANNULUS_MPI(MPI_Type_create_resized(piece, 0, in.elements() * width, &spaced));
    ANNULUS_MPI(MPI_Type_free(&piece));
    ANNULUS_MPI(MPI_Type_commit(&spaced));
    request->Own(spaced);
    const void* from = in_place ? MPI_IN_PLACE : static_cast<const char*>(in.raw()) + begin * width;
    void* to = static_cast<char*>(out.raw()) + begin * width;
    MPI_Request started;
    const int code = MPI_Iallgather(from, count, MpiType(in.dtype()), to, 1, spaced, group_->get(), &started);
    ANNULUS_RETURN_IF_ERROR(
        request->parts().Started(code, "MPI_Iallgather", started, group_->get(), MpiAwaited::kWholeGroup));
  }
  return Request(std::move(request));
}

absl::StatusOr<Request> MpiComm::Broadcast(TensorRef data, int root) {
  ANNULUS_CHECK(0 <= root && root < size_) << "root " << root;
  auto request = std::make_unique<MpiRequest>(progress_);
  for (int64_t begin = 0; begin < data.elements(); begin += kPieceElements) {
    const int count = static_cast<int>(std::min(kPieceElements, data.elements() - begin));
    void* at = static_cast<char*>(data.raw()) + begin * SizeOf(data.dtype());
    MPI_Request started;
    const int code = MPI_Ibcast(at, count, MpiType(data.dtype()), root, group_->get(), &started);
    ANNULUS_RETURN_IF_ERROR(
        request->parts().Started(code, "MPI_Ibcast", started, group_->get(), MpiAwaited::kWholeGroup));
  }
  return Request(std::move(request));
}

absl::StatusOr<std::shared_ptr<CommBackend>> MpiComm::Split(int color, int key) {
  // The calls below block. Once every rank is here none waits for a reduction that only our polls move.
  MpiRequest all_here(progress_);
  MPI_Request started;
  const int code = MPI_Ibarrier(group_->get(), &started);
  ANNULUS_RETURN_IF_ERROR(
      all_here.parts().Started(code, "MPI_Ibarrier", started, group_->get(), MpiAwaited::kWholeGroup));
  for (Backoff backoff;; backoff.Pause()) {
    ANNULUS_ASSIGN_OR_RETURN(const bool complete, all_here.Test());
    if (complete) break;
  }
  MPI_Comm split;
  ANNULUS_MPI(MPI_Comm_split(group_->get(), color, key, &split));
  const MpiGroup owner(split);
  return Create(split, progress_);
}

}  // namespace

absl::Status MpiStatus(int code, const char* call) {
  if (code == MPI_SUCCESS) return absl::OkStatus();
  mpi_failed = true;
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(code, text, &length);
  return absl::InternalError(absl::StrCat(call, ": ", text));
}

MPI_Datatype MpiType(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return MPI_FLOAT;
    case DType::kF64:
      return MPI_DOUBLE;
    case DType::kBF16:
      return MPI_UINT16_T;  // MPI only moves it
    case DType::kI32:
      return MPI_INT32_T;
    case DType::kI64:
      return MPI_INT64_T;
    case DType::kU8:
      return MPI_UINT8_T;
  }
  return MPI_DATATYPE_NULL;
}

absl::StatusOr<MpiSession> MpiSession::Start(int* argc, char*** argv) {
  int provided = 0;
  ANNULUS_MPI(MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided));
  MpiSession session;
  session.active_ = true;
  if (provided < MPI_THREAD_FUNNELED) {
    return absl::FailedPreconditionError(
        absl::StrCat("MPI_Init_thread: thread level ", provided, ": expected MPI_THREAD_FUNNELED"));
  }
  ANNULUS_MPI(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
  ANNULUS_ASSIGN_OR_RETURN(std::shared_ptr<CommBackend> world,
                           MpiComm::Create(MPI_COMM_WORLD, std::make_shared<CommProgress>()));
  session.world_ = Communicator(std::move(world));
  ANNULUS_ASSIGN_OR_RETURN(std::vector<std::string> hosts, session.world_.AllGatherStrings(HostName()));
  AwaitedByMpi().SetWorld(std::move(hosts));
  return session;
}

MpiSession::MpiSession(MpiSession&& other) noexcept
    : world_(std::move(other.world_)), active_(std::exchange(other.active_, false)) {}

MpiSession::~MpiSession() {
  if (!active_) return;
  world_ = Communicator();
  // After a failure peers may never reach MPI_Finalize, which would wait for them. Leaving without it makes
  // mpirun end the job.
  if (!mpi_failed) MPI_Finalize();
}

std::string MpiLibraryVersion() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  MPI_Get_library_version(text, &length);
  return std::string(text, std::min(static_cast<size_t>(length), std::string(text).find(',')));
}

void MpiSession::Abort(int exit_code) {
  std::fflush(nullptr);
  MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);
}

}  // namespace annulus
