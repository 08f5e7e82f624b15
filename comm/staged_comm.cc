// Device tensors through pinned memory and the host communicator, in pieces:
//
//     stream `down`:  [wait for ctx.stream()][device -> pinned]
//     host:                                                    [operation of the host communicator]
//     stream `up`:                                                                          [pinned ->
//     device]
//
// An operation advances when anything is polled (progress.h). Its piece of pinned memory goes back to the
// pool once the device has read it, so that a long tensor takes no more than a short one.

#include "staged_comm.h"

#include <algorithm>
#include <bit>
#include <deque>
#include <map>
#include <tuple>

#include "annulus/device/transfer.h"
#include "backoff.h"
#include "gpu_backend.h"
#include "progress.h"

namespace annulus {
namespace {

struct PinnedPiece {
  PinnedBuffer memory;
  Event used;  // the last copy from or to it
};

// Pieces of a power of two bytes, made at first use.
class PinnedPool {
 public:
  explicit PinnedPool(Device device) : device_(device) {}

  PinnedPiece Take(int64_t bytes) {
    const int64_t rounded = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(bytes)));
    const auto found = std::find_if(free_.begin(), free_.end(), [&](const PinnedPiece& piece) {
      return piece.memory.bytes() == rounded && piece.used.Done();
    });
    if (found == free_.end()) return {PinnedBuffer(device_, rounded), Event(device_)};
    PinnedPiece piece = std::move(*found);
    free_.erase(found);
    return piece;
  }
  void Return(PinnedPiece piece) { free_.push_back(std::move(piece)); }

 private:
  Device device_;
  std::vector<PinnedPiece> free_;
};

// What the operations of one communicator share.
struct Staging {
  // `host_comm` is used by nothing else: its operations start when copies are done, so not in the order in
  // which the caller's own host operations lie between them.
  Staging(Communicator host_comm, Context& context, std::string lane_name, int64_t bytes)
      : host(std::move(host_comm)),
        ctx(context),
        lane(std::move(lane_name)),
        piece_bytes(bytes),
        progress(host.progress()),
        down(ctx.device, StreamPriority::kHigh),
        up(ctx.device, StreamPriority::kHigh),
        pool(ctx.device) {
    if (progress == nullptr) progress = std::make_shared<CommProgress>();
  }

  Communicator host;
  Context& ctx;
  const std::string lane;
  const int64_t piece_bytes;
  std::shared_ptr<CommProgress> progress;
  Stream down, up;
  PinnedPool pool;
};

// Operations that have pieces to start, in the order of the calls. Peers pair the pieces by their order, and
// the ends of copies may be seen in any: only the first starts pieces.
class StagedOperation;
using Queue = std::deque<const StagedOperation*>;

class StagedOperation : public RequestState, public PolledOperation {
 public:
  StagedOperation(std::shared_ptr<Staging> staging, std::shared_ptr<Queue> queue,
                  const GpuOperation& operation);
  ~StagedOperation() override;

  absl::StatusOr<bool> Test() override;
  absl::Status Wait() override;
  void Advance() override;

 private:
  enum class Phase { kQueued, kToHost, kOnHost, kToDevice };

  bool Sends() const { return o_.call != GpuCall::kReceive && (o_.call != GpuCall::kBroadcast || IsRoot()); }
  bool Receives() const { return o_.call != GpuCall::kSend && (o_.call != GpuCall::kBroadcast || !IsRoot()); }
  bool IsRoot() const { return o_.peer == s_->host.rank(); }
  bool IsLastPiece() const { return begin_ + piece_ >= part_; }
  int64_t PieceElements() const { return std::min(piece_, part_ - begin_); }
  // The piece's own elements in pinned memory.
  TensorRef PinnedIn() const { return Pinned(0, in_parts_ * PieceElements()); }
  TensorRef PinnedOut() const {
    return Pinned(OneRegion() ? 0 : in_parts_ * PieceElements(), out_parts_ * PieceElements());
  }
  bool OneRegion() const { return in_parts_ == out_parts_; }  // the host operation is in place
  int64_t PinnedParts() const { return OneRegion() ? 1 : in_parts_ + out_parts_; }
  TensorRef Pinned(int64_t begin, int64_t elements) const {
    return {static_cast<char*>(pinned_.memory.data()) + begin * SizeOf(dtype_), dtype_, Device{}, {elements}};
  }
  absl::Status AdvancePhases();
  void StartPiece();
  absl::StatusOr<Request> StartOnHost();
  void CopyToDevice();
  void LeaveQueue();

  const std::shared_ptr<Staging> s_;
  const std::shared_ptr<Queue> queue_;
  const GpuOperation o_;
  const DType dtype_;
  int64_t in_parts_ = 1, out_parts_ = 1;  // of `part_` elements each, in o_.in and o_.out
  int64_t part_ = 0, piece_ = 0;          // a piece is [begin_, begin_ + piece_) of every part
  int64_t begin_ = 0;
  Phase phase_ = Phase::kQueued;
  Event ready_;  // of ctx.stream() at the call
  PinnedPiece pinned_;
  Request on_host_;
  absl::Status status_;
};

StagedOperation::StagedOperation(std::shared_ptr<Staging> staging, std::shared_ptr<Queue> queue,
                                 const GpuOperation& operation)
    : s_(std::move(staging)),
      queue_(std::move(queue)),
      o_(operation),
      dtype_(o_.call == GpuCall::kReceive ? o_.out.dtype() : o_.in.dtype()),
      ready_(s_->ctx.device) {
  if (o_.call == GpuCall::kReduceScatter) in_parts_ = s_->host.size();
  if (o_.call == GpuCall::kAllGather) out_parts_ = s_->host.size();
  part_ = o_.call == GpuCall::kReceive ? o_.out.elements() : o_.in.elements() / in_parts_;
  piece_ = std::clamp<int64_t>(s_->piece_bytes / (PinnedParts() * SizeOf(dtype_)), 1, part_);

  ready_.Record(s_->ctx.stream());
  ready_.Hold(s_->down.handle());
  s_->ctx.recorder.Note(s_->lane, ToString(o_), s_->down.handle());
  queue_->push_back(this);
  s_->progress->Add(this);
}

StagedOperation::~StagedOperation() {
  s_->progress->Remove(this);
  LeaveQueue();
  if (phase_ != Phase::kQueued) s_->pool.Return(std::move(pinned_));
}

void StagedOperation::LeaveQueue() { std::erase(*queue_, this); }

absl::StatusOr<bool> StagedOperation::Test() {
  s_->progress->Poll();
  ANNULUS_RETURN_IF_ERROR(status_);
  return phase_ == Phase::kToDevice && IsLastPiece() && pinned_.used.Done();
}

absl::Status StagedOperation::Wait() {
  for (Backoff backoff;; backoff.Pause()) {
    s_->progress->Poll();
    ANNULUS_RETURN_IF_ERROR(status_);
    if (phase_ == Phase::kToDevice && IsLastPiece()) break;
  }
  pinned_.used.Hold(s_->ctx.stream());
  return absl::OkStatus();
}

void StagedOperation::Advance() {
  if (!status_.ok()) return;
  status_ = AdvancePhases();
  if (!status_.ok()) LeaveQueue();
}

absl::Status StagedOperation::AdvancePhases() {
  if (phase_ == Phase::kQueued) {
    if (queue_->front() != this) return absl::OkStatus();
    pinned_ = s_->pool.Take(PinnedParts() * piece_ * SizeOf(dtype_));
    StartPiece();
  }
  while (true) {
    if (phase_ == Phase::kToHost) {
      if (!pinned_.used.Done()) return absl::OkStatus();
      ANNULUS_ASSIGN_OR_RETURN(on_host_, StartOnHost());
      phase_ = Phase::kOnHost;
      if (IsLastPiece()) LeaveQueue();
    }
    if (phase_ == Phase::kOnHost) {
      ANNULUS_ASSIGN_OR_RETURN(const bool complete, on_host_.Test());
      if (!complete) return absl::OkStatus();
      CopyToDevice();
      phase_ = Phase::kToDevice;
    }
    if (IsLastPiece() || !pinned_.used.Done()) return absl::OkStatus();
    begin_ += piece_;
    StartPiece();
  }
}

// [begin, begin + count) of a tensor's elements, whatever its shape.
template <typename Ref>
Ref Elements(const Ref& tensor, int64_t begin, int64_t count) {
  return tensor.Reshaped({tensor.elements()}).Rows(begin, begin + count);
}

void StagedOperation::StartPiece() {
  phase_ = Phase::kToHost;
  if (!Sends()) return;
  const int64_t count = PieceElements();
  for (int64_t p = 0; p < in_parts_; ++p) {
    CopyBytes(Elements(o_.in, p * part_ + begin_, count), Elements(PinnedIn(), p * count, count),
              s_->down.handle());
  }
  pinned_.used.Record(s_->down.handle());
}

absl::StatusOr<Request> StagedOperation::StartOnHost() {
  Communicator& host = s_->host;
  switch (o_.call) {
    case GpuCall::kSend:
      return host.Send(PinnedIn(), o_.peer, o_.tag);
    case GpuCall::kReceive:
      return host.Receive(PinnedOut(), o_.peer, o_.tag);
    case GpuCall::kAllReduce:
      return host.IAllReduce(PinnedIn(), o_.op);
    case GpuCall::kReduceScatter:
      return host.IReduceScatter(PinnedIn(), PinnedOut());
    case GpuCall::kAllGather:
      return host.IAllGather(PinnedIn(), PinnedOut());
    case GpuCall::kBroadcast:
      return host.IBroadcast(PinnedIn(), o_.peer);
  }
  return Request();
}

void StagedOperation::CopyToDevice() {
  const StreamHandle up = s_->up.handle();
  if (Receives()) {
    ready_.Hold(up);  // earlier work on ctx.stream() may still read what is overwritten
    const int64_t count = PieceElements();
    for (int64_t p = 0; p < out_parts_; ++p)
      CopyBytes(Elements(PinnedOut(), p * count, count), Elements(o_.out, p * part_ + begin_, count), up);
    pinned_.used.Record(up);
  }
  if (IsLastPiece()) s_->ctx.recorder.Note(s_->lane + ", complete", ToString(o_), up);
}

class StagedComm : public GpuBackend {
 public:
  static absl::StatusOr<std::shared_ptr<CommBackend>> Create(Communicator host, Context& ctx,
                                                             std::string lane, int64_t piece_bytes) {
    ANNULUS_ASSIGN_OR_RETURN(Communicator twin, host.Split(0, host.rank()));
    auto staging = std::make_shared<Staging>(std::move(twin), ctx, lane, piece_bytes);
    return std::make_shared<StagedComm>(std::move(host), ctx, std::move(lane), std::move(staging));
  }
  StagedComm(Communicator host, Context& ctx, std::string lane, std::shared_ptr<Staging> staging)
      : GpuBackend(std::move(host), ctx, std::move(lane)), staging_(std::move(staging)) {}

  absl::StatusOr<std::shared_ptr<CommBackend>> Split(int color, int key) override {
    ANNULUS_ASSIGN_OR_RETURN(Communicator part, host_.Split(color, key));
    return Create(std::move(part), ctx_, LaneOf(color), staging_->piece_bytes);
  }

 protected:
  absl::StatusOr<Request> Start(const GpuOperation& operation) override {
    const bool message = operation.call == GpuCall::kSend || operation.call == GpuCall::kReceive;
    // Collectives are one sequence; so are the messages of a pair, a direction and a tag.
    std::shared_ptr<Queue>& queue = queues_[message ? Key(operation.call, operation.peer, operation.tag)
                                                    : Key(GpuCall::kAllReduce, 0, 0)];
    if (queue == nullptr) queue = std::make_shared<Queue>();
    auto state = std::make_unique<StagedOperation>(staging_, queue, operation);
    staging_->progress->Poll();
    return Request(std::move(state));
  }

 private:
  using Key = std::tuple<GpuCall, int, int>;
  const std::shared_ptr<Staging> staging_;
  std::map<Key, std::shared_ptr<Queue>> queues_;
};

}  // namespace

absl::StatusOr<Communicator> MakeStagedComm(Communicator host, Context& ctx, std::string lane,
                                            int64_t piece_bytes) {
  ANNULUS_CHECK(piece_bytes > 0) << piece_bytes;
  ANNULUS_ASSIGN_OR_RETURN(std::shared_ptr<CommBackend> backend,
                           StagedComm::Create(std::move(host), ctx, std::move(lane), piece_bytes));
  return Communicator(std::move(backend));
}

}  // namespace annulus
