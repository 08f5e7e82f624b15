#include <algorithm>

#include "absl/strings/str_cat.h"
#include "annulus/comm/awaited.h"
#include "mpi_internal.h"

namespace annulus {
namespace {

// The last part alone is tested at first: with many parts a test of each would cost more than the messages
// do. From time to time all are, so that those that ended are not named as awaited.
constexpr int64_t kTestsOfLast = 1024;

}  // namespace

absl::Status MpiParts::Started(int code, const char* call, MPI_Request request, MPI_Comm comm, int peer) {
  ANNULUS_RETURN_IF_ERROR(MpiStatus(code, call));
  parts_.push_back({request, MPI_DATATYPE_NULL, 0, comm, peer});
  AwaitedByMpi().Count(comm, peer, 1);
  return absl::OkStatus();
}

absl::Status MpiParts::Send(const void* data, DType dtype, int64_t elements, int peer, int tag,
                            MPI_Comm comm) {
  for (int64_t begin = 0; begin < elements; begin += kPieceElements) {
    const int count = static_cast<int>(std::min(kPieceElements, elements - begin));
    const void* at = static_cast<const char*>(data) + begin * SizeOf(dtype);
    MPI_Request started;
    const int code = MPI_Isend(at, count, MpiType(dtype), peer, tag, comm, &started);
    ANNULUS_RETURN_IF_ERROR(Started(code, "MPI_Isend", started, comm, peer));
  }
  return absl::OkStatus();
}

absl::Status MpiParts::Receive(void* data, DType dtype, int64_t elements, int peer, int tag, MPI_Comm comm) {
  for (int64_t begin = 0; begin < elements; begin += kPieceElements) {
    const int count = static_cast<int>(std::min(kPieceElements, elements - begin));
    void* at = static_cast<char*>(data) + begin * SizeOf(dtype);
    MPI_Request started;
    const int code = MPI_Irecv(at, count, MpiType(dtype), peer, tag, comm, &started);
    ANNULUS_RETURN_IF_ERROR(Started(code, "MPI_Irecv", started, comm, peer));
    parts_.back().type = MpiType(dtype);
    parts_.back().expected = count;
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> MpiParts::TestPart(Part& part) {
  int complete = 0;
  MPI_Status status;
  ANNULUS_MPI(MPI_Test(&part.request, &complete, &status));
  if (complete == 0) return false;
  AwaitedByMpi().Count(part.comm, part.peer, -1);
  if (part.type == MPI_DATATYPE_NULL) return true;
  int count = 0;
  ANNULUS_MPI(MPI_Get_count(&status, part.type, &count));
  if (count == part.expected) return true;
  return absl::InternalError(absl::StrCat("a message from rank ", status.MPI_SOURCE, " with tag ",
                                          status.MPI_TAG, " has ", count, " elements: expected ",
                                          part.expected));
}

absl::StatusOr<bool> MpiParts::Test() {
  while (!parts_.empty()) {
    ANNULUS_ASSIGN_OR_RETURN(const bool complete, TestPart(parts_.back()));
    if (!complete) break;
    parts_.pop_back();
  }
  if (++tests_ % kTestsOfLast == 0) {
    for (size_t i = parts_.size(); i-- > 0;) {
      ANNULUS_ASSIGN_OR_RETURN(const bool complete, TestPart(parts_[i]));
      if (complete) parts_.erase(parts_.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
  return parts_.empty();
}

void MpiAwaited::SetWorld(std::vector<std::string> hosts) {
  hosts_ = std::move(hosts);
  operations_ = std::vector<std::atomic<int>>(hosts_.size());
}

void MpiAwaited::AddGroup(MPI_Comm comm) {
  MPI_Group world, group;
  int size = 0, rank = 0;
  MPI_Comm_rank(comm, &rank);
  MPI_Comm_group(MPI_COMM_WORLD, &world);
  MPI_Comm_group(comm, &group);
  MPI_Group_size(group, &size);
  std::vector<int> ranks(static_cast<size_t>(size)), of_world(ranks.size());
  for (int i = 0; i < size; ++i) ranks[static_cast<size_t>(i)] = i;
  MPI_Group_translate_ranks(group, size, ranks.data(), world, of_world.data());
  MPI_Group_free(&group);
  MPI_Group_free(&world);
  groups_[comm] = {.rank = rank, .of_world = std::move(of_world)};
}

void MpiAwaited::Count(MPI_Comm comm, int peer, int change) {
  const auto group = groups_.find(comm);
  if (operations_.empty() || group == groups_.end()) return;  // while the session starts or ends
  const std::vector<int>& of_world = group->second.of_world;
  const auto count = [&](int rank) {
    operations_[static_cast<size_t>(of_world[static_cast<size_t>(rank)])].fetch_add(change);
  };
  if (peer != kWholeGroup) return count(peer);
  for (int rank = 0; rank < static_cast<int>(of_world.size()); ++rank) {
    if (rank != group->second.rank) count(rank);
  }
}

std::string MpiAwaited::Text() const {
  std::string text;
  size_t awaited = 0;
  for (size_t rank = 0; rank < operations_.size(); ++rank) {
    if (operations_[rank].load() <= 0 || ++awaited > kMostNamed) continue;
    absl::StrAppend(&text, text.empty() ? "" : ", ", "rank ", rank, " on ", hosts_[rank]);
  }
  if (awaited > kMostNamed) absl::StrAppend(&text, " and ", awaited - kMostNamed, " more");
  return text;
}

MpiAwaited& AwaitedByMpi() {
  static MpiAwaited awaited;  // MPI is one per process
  return awaited;
}

std::string AwaitedRanks() { return AwaitedByMpi().Text(); }

}  // namespace annulus
