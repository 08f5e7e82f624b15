#pragma once

// What the MPI backend's files share: calls that turn errors into Status, datatypes, requests, and sums.

#define OMPI_SKIP_MPICXX 1  // the C++ bindings are gone since MPI-3.0
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>

#include <memory>
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

// Complete when all of `parts` are. Each part that receives says how many elements it expects.
class MpiParts {
 public:
  absl::Status Started(int code, const char* call, MPI_Request request) {
    ANNULUS_RETURN_IF_ERROR(MpiStatus(code, call));
    parts_.push_back({request, MPI_DATATYPE_NULL, 0});
    return absl::OkStatus();
  }
  // [elements] to or from `peer`, in pieces.
  absl::Status Send(const void* data, DType dtype, int64_t elements, int peer, int tag, MPI_Comm comm);
  absl::Status Receive(void* data, DType dtype, int64_t elements, int peer, int tag, MPI_Comm comm);

  absl::StatusOr<bool> Test();

 private:
  struct Part {
    MPI_Request request;
    MPI_Datatype type;  // of a receive, else null
    int expected;
  };
  std::vector<Part> parts_;
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
