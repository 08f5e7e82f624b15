#pragma once

// Memory of every rank of a group that all its ranks can write, over CUDA IPC: ranks are processes on one
// host, on GPUs that can map each other's memory or on the same GPU.

#include <atomic>
#include <string>
#include <vector>

#include "annulus/comm/communicator.h"

namespace annulus {

class PeerMemory {
 public:
  PeerMemory(Communicator cp, Device device);
  // Collective unless abandoned: memory that a peer has mapped may not be freed.
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  // Gives every rank `bytes`, zeroed, instead of what it had. Waits for the device. Collective; fails on all
  // ranks or on none, and then there is no memory.
  absl::Status Resize(int64_t bytes);

  int64_t bytes() const { return bytes_; }
  char* at(int cp_rank) const { return at_[static_cast<size_t>(cp_rank)]; }  // mapped into this process

  // From any thread: peers may be gone, so the end of the process frees and unmaps everything.
  void Abandon() { abandoned_ = true; }

 private:
  absl::Status Unmap();
  absl::Status Allocate(int64_t bytes, std::string* handle);
  absl::Status Map(const std::vector<std::string>& handles);
  absl::Status Release();

  Communicator cp_;
  const Device device_;
  int64_t bytes_ = 0;
  std::vector<char*> at_;  // by rank; null where there is none
  std::atomic<bool> abandoned_{false};
};

// OK if the ranks of the group can have such memory, else InvalidArgument on every rank with the reason.
// Collective.
absl::Status CheckPeerMemory(Communicator cp, Device device);

}  // namespace annulus
