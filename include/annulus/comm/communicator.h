#pragma once

// One group of ranks behind one value type: MPI between processes, loopback between threads of one
// process (tests, plan replay). Ranks here are group ranks, named by the caller (cp_rank, dp_rank, ...).
//
// Point-to-point calls never block: a Request completes by being polled. Collectives are called by every
// rank of the group in the same order. All calls on one Communicator come from one thread.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "annulus/base/status.h"
#include "annulus/device/tensor.h"

namespace annulus {

enum class ReduceOp { kSum, kMax, kMin };

class RequestState {
 public:
  virtual ~RequestState() = default;
  virtual absl::StatusOr<bool> Test() = 0;  // true once complete; never blocks
  virtual absl::Status Wait();              // polls Test, yielding the core
};

// An operation under way. Destroying an incomplete one aborts the job: its memory would be reused.
// One that failed counts as complete.
class Request {
 public:
  Request() = default;  // complete
  explicit Request(std::unique_ptr<RequestState> state) : state_(std::move(state)) {}
  Request(Request&& other) noexcept = default;
  Request& operator=(Request&& other) noexcept;
  ~Request();

  absl::StatusOr<bool> Test();  // true once complete
  // Returns once the result may be used: on GPUs once the stream, not the host, waits for it
  // (gpu_communicator.h).
  absl::Status Wait();
  bool done() const { return state_ == nullptr; }

 private:
  std::unique_ptr<RequestState> state_;
};

class CommProgress;

class CommBackend {
 public:
  virtual ~CommBackend() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual absl::StatusOr<Request> Send(ConstTensorRef data, int peer, int tag) = 0;
  virtual absl::StatusOr<Request> Receive(TensorRef data, int peer, int tag) = 0;
  virtual absl::StatusOr<Request> AllReduce(TensorRef data, ReduceOp op) = 0;
  virtual absl::StatusOr<Request> ReduceScatter(ConstTensorRef in, TensorRef out) = 0;
  virtual absl::StatusOr<Request> AllGather(ConstTensorRef in, TensorRef out) = 0;
  virtual absl::StatusOr<Request> Broadcast(TensorRef data, int root) = 0;
  virtual absl::StatusOr<std::shared_ptr<CommBackend>> Split(int color, int key) = 0;
  // What every Test of this group advances; null if its operations need no polling.
  virtual std::shared_ptr<CommProgress> progress() const { return nullptr; }
  // For a watchdog, from any thread: an error that showed after the call that caused it; and giving up all
  // that is under way, so that a stuck device lets go. Nothing else may be called afterwards.
  virtual absl::Status Health() { return absl::OkStatus(); }
  virtual void Abort() {}
};

class Communicator {
 public:
  Communicator() = default;
  explicit Communicator(std::shared_ptr<CommBackend> backend) : backend_(std::move(backend)) {}

  int rank() const { return backend_->rank(); }
  int size() const { return backend_->size(); }

  // Point to point. Messages between one pair with one tag arrive in order. 0 <= tag < kMaxTag.
  static constexpr int kMaxTag = 32767;  // what every MPI offers (MPI-4.0, 9.1.2: MPI_TAG_UB >= 32767)
  absl::StatusOr<Request> Send(ConstTensorRef data, int peer, int tag) {
    return backend_->Send(data, peer, tag);
  }
  absl::StatusOr<Request> Receive(TensorRef data, int peer, int tag) {
    return backend_->Receive(data, peer, tag);
  }

  // Collectives that run in the background until the Request is complete; `I` as in MPI.
  // On hosts every sum is taken in rank order, so its bits depend on the operands only.
  absl::StatusOr<Request> IAllReduce(TensorRef data, ReduceOp op) { return backend_->AllReduce(data, op); }
  // in: [size * n] -> out: [n], the sum over ranks of the rank-th part. `out` may be that part of `in`.
  absl::StatusOr<Request> IReduceScatter(ConstTensorRef in, TensorRef out) {
    return backend_->ReduceScatter(in, out);
  }
  // in: [n] -> out: [size * n]. `in` may be the rank-th part of `out`.
  absl::StatusOr<Request> IAllGather(ConstTensorRef in, TensorRef out) {
    return backend_->AllGather(in, out);
  }
  absl::StatusOr<Request> IBroadcast(TensorRef data, int root) { return backend_->Broadcast(data, root); }

  // Blocking forms.
  absl::Status AllReduce(TensorRef data, ReduceOp op);
  absl::Status ReduceScatter(ConstTensorRef in, TensorRef out);
  absl::Status AllGather(ConstTensorRef in, TensorRef out);
  absl::Status Broadcast(TensorRef data, int root);
  absl::Status Barrier();

  // The root's string on every rank.
  absl::StatusOr<std::string> BroadcastString(const std::string& value, int root);
  // Every rank's string, in rank order, on every rank.
  absl::StatusOr<std::vector<std::string>> AllGatherStrings(const std::string& value);
  absl::StatusOr<double> AllReduceValue(double value, ReduceOp op);

  // OK if every rank passed OK; else, on every rank, the error of the lowest failing rank, which it names
  // (rank of this group) unless all ranks failed; IsAgreed() tells such a status from one rank's own. Call it
  // after anything that can fail on one rank and before the next collective.
  absl::Status AgreeOk(const absl::Status& status);

  // Ranks with equal color (>= 0) form a group, ordered by key, then by rank.
  absl::StatusOr<Communicator> Split(int color, int key);

  std::shared_ptr<CommProgress> progress() const { return backend_->progress(); }
  absl::Status Health() const { return backend_->Health(); }
  void Abort() { backend_->Abort(); }

 private:
  std::shared_ptr<CommBackend> backend_;
};

// Whether every rank of a group got this error from AgreeOk: then one of them reports it.
bool IsAgreed(const absl::Status& status);

// MPI_Init (thread level: funneled), and MPI_Finalize on destruction. One per process.
class MpiSession {
 public:
  static absl::StatusOr<MpiSession> Start(int* argc, char*** argv);
  MpiSession(MpiSession&& other) noexcept;
  ~MpiSession();

  Communicator world() const { return world_; }
  // Ends the whole job at once with `exit_code`: after a failure that other ranks do not know of.
  [[noreturn]] static void Abort(int exit_code);

 private:
  MpiSession() = default;
  Communicator world_;
  bool active_ = false;
};

// Name and version of the MPI library that is linked, on one line.
std::string MpiLibraryVersion();

// `size` communicators of one group inside this process; each is used by its own thread. An operation that is
// not complete after `timeout_seconds` fails with DeadlineExceeded, and so does all later use of the group:
// a thread that failed cannot hang the others. A send completes when its receive has copied the data.
std::vector<Communicator> MakeLoopbackGroup(int size, double timeout_seconds = 120);

// The same group with every point-to-point message completing at its receiver no earlier than `delay_us`
// after it was sent, as over a slow network. Groups split from it keep the delay. Called by every rank of the
// group. Send times are read from the monotonic clock, so all ranks must be on one host.
Communicator WithMessageDelay(Communicator comm, double delay_us);

}  // namespace annulus
