#include "nccl_call.h"

namespace annulus {

absl::Status NcclStatus(ncclResult_t code, const char* where, const char* call, Device device,
                        ncclComm_t comm) {
  if (code == ncclSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(where, ": ", call, " on ", ToString(device), ": ",
                                          ncclGetErrorString(code), ": ", ncclGetLastError(comm)));
}

absl::StatusOr<ncclComm_t> ConnectNccl(Communicator host, Device device, int max_ctas) {
  ncclUniqueId id{};
  absl::Status made;
  if (host.rank() == 0) made = ANNULUS_NCCL(ncclGetUniqueId(&id), device, nullptr);
  ANNULUS_RETURN_IF_ERROR(host.AgreeOk(made));
  ANNULUS_ASSIGN_OR_RETURN(const std::string bytes,
                           host.BroadcastString(std::string(id.internal, sizeof(id.internal)), 0));
  bytes.copy(id.internal, sizeof(id.internal));

  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 1;
  config.maxCTAs = max_ctas;
  ncclComm_t comm = nullptr;
  const absl::Status joined =
      ANNULUS_NCCL(ncclCommInitRankConfig(&comm, host.size(), id, host.rank(), &config), device, nullptr);
  const absl::Status agreed = host.AgreeOk(joined);
  if (agreed.ok()) return comm;
  if (joined.ok()) ncclCommAbort(comm);  // to destroy it would wait for the ranks that have none
  return agreed;
}

}  // namespace annulus
