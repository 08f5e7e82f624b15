#pragma once

// What the MPI backend's files share: calls that turn errors into Status, datatypes, requests, and sums.

#define OMPI_SKIP_MPICXX 1  // the C++ bindings are gone since MPI-3.0
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>

#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "annulus/comm/communicator.h"
#include "progress.h"

namespace annulus {

// OK, or Internal naming the call and MPI's text for `code`. Any error means that the session cannot
// finalize.
absl::Status MpiStatus(int code, const char* call);

#define ANNULUS_MPI(call) ANNULUS_RETURN_IF_ERROR(MpiStatus(call, #call))

MPI_Datatype MpiType(DType dtype);

// MPI counts are int: larger tensors travel in pieces of this many elements (16 Mi, 64 MiB of f32, so that
// the cost of a piece is its bytes).
inline constexpr int64_t kPieceElements = int64_t{1} << 24;

// Which ranks of the world this process waits for: of each, the operations under way that need it. Groups are
// added and removed, and operations begin and end, on the one thread that calls MPI; a watchdog asks from
// another.
class MpiAwaited {
 public:
  static constexpr int kWholeGroup = -1;  // as a peer: every other rank of the group

  void SetWorld(std::vector<std::string> hosts);  // of each rank
  void AddGroup(MPI_Comm comm);
  void RemoveGroup(MPI_Comm comm) { groups_.erase(comm); }
  void Count(MPI_Comm comm, int peer, int change);
  // "rank 2 on host1, rank 3 on host1"; empty: nothing is awaited.
  std::string Text() const;

 private:
  static constexpr size_t kMostNamed = 8;
  std::vector<std::string> hosts_;
  std::vector<std::atomic<int>> operations_;  // by rank of the world
  struct Group {
    int rank = 0;               // this process's
    std::vector<int> of_world;  // of each rank, that of the world
  };
  std::map<MPI_Comm, Group> groups_;
};
MpiAwaited& AwaitedByMpi();

// Complete when all of `parts` are. Each part that receives says how many elements it expects.
class MpiParts {
 public:
  // peer: of a message, else MpiAwaited::kWholeGroup.
  absl::Status Started(int code, const char* call, MPI_Request request, MPI_Comm comm, int peer);
  // [elements] to or from `peer`, in pieces.
  absl::Status Send(const void* data, DType dtype, int64_t elements, int peer, int tag, MPI_Comm comm);
  absl::Status Receive(void* data, DType dtype, int64_t elements, int peer, int tag, MPI_Comm comm);

  absl::StatusOr<bool> Test();

 private:
  struct Part {
    MPI_Request request;
    MPI_Datatype type;  // of a receive, else null
    int expected;
    MPI_Comm comm;
    int peer;
  };
  // Whether it is complete.
  static absl::StatusOr<bool> TestPart(Part& part);

  std::vector<Part> parts_;
  int64_t tests_ = 0;
};

// A reduction in rank order, whatever the size of the tensor: every rank receives all contributions to its
// part of the tensor and adds them up itself; an all-reduce then sends the parts to everyone.
struct MpiReduction {
  MPI_Comm comm;
  int tag;
  DType dtype;
  ReduceOp op;
  const void* in;                // all parts
  std::vector<int64_t> offsets;  // [size + 1] elements; part p of `in` is [offsets[p], offsets[p + 1])
  void* out;                     // this rank's part
  void* gathered;                // all parts, or null for a reduce-scatter
};
std::unique_ptr<RequestState> StartReduction(const MpiReduction& reduction,
                                             std::shared_ptr<CommProgress> progress);

}  // namespace annulus
