#pragma once

// Hosts made of Linux namespaces: each has its own host name, network, processes and
// shared memory, so that what runs on one sees the other as another machine with the same files.
//
//   machine   process 1 of all that belongs to them; it is host0, and the switch between them
//     host1   process 1 of that host: it sleeps, and takes all its processes along when it ends
//     host2   ...
//
// They have no names that could stay behind: the kernel removes them with their last process.

#include <sys/types.h>

#include <string>
#include <vector>

#include "annulus/base/status.h"

namespace annulus::hosts {

inline constexpr int kMostHosts = 250;  // of one /24 network

std::string HostName(int host);  // "host3"

// A process that this one has been told to run, as `clone` would with these namespaces; 0 in the child, which
// is ended when its parent ends.
absl::StatusOr<pid_t> ForkIntoNamespaces(int flags);
// Of host0: the namespaces in which it and the switch live. `hosts`: how many there will be.
absl::StatusOr<pid_t> ForkMachine();
// In the machine: what host0 needs, and the names of all.
absl::Status SetUpFirstHost(int hosts);
// In the machine: another host. Its process 1.
absl::StatusOr<pid_t> StartHost(int host);
// In the machine: the TAP device of a host, with its address; non-blocking.
absl::StatusOr<int> OpenTap(int host, pid_t process);

// Runs a command by a shell on the host whose process 1 this is, as a login there would: with few variables,
// in the home directory. Its exit code.
absl::StatusOr<int> RunOnHost(pid_t process, const std::string& command);

// Processes below the machine's own but for process 1 of each host, in words: "annulus (12) on host1".
std::vector<std::string> ProcessesLeft(const std::vector<pid_t>& hosts);

}  // namespace annulus::hosts
